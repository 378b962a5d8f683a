"""The plugin's configuration keys."""

from detectron2.config import CfgNode

__all__ = ["add_deform_config"]


def add_deform_config(cfg: CfgNode) -> None:
    """Adds every key of this plugin, with its default, to one config.

    Call it before ``merge_from_file``, in any order with other projects' ``add_*_config``:

        >>> cfg = get_cfg()
        >>> add_deform_config(cfg)
        >>> cfg.merge_from_file("configs/...")

    Args:
        cfg: changed in place. Detectron2's global default is not.
    """
    # ------------------------------------------------------------------------ #
    # Backbones "build_deform_resnet_backbone", "build_aligned_inception_resnet_backbone" and both
    # with "_fpn_backbone"; they read MODEL.RESNETS as well
    # ------------------------------------------------------------------------ #
    cfg.MODEL.DEFORM = CfgNode()
    # The last N 3x3 convolutions of the backbone are deformable, counted from its end across
    # stages: 3 is all of res5 in ResNet-50 to 152 (the paper's default), 6 reaches into res4,
    # 0 is the plain network. A block of ResNet-18/34 has two of them, others have one. In
    # Aligned-Inception-ResNet the last N blocks are, each with its three.
    cfg.MODEL.DEFORM.NUM_LAYERS = 3
    # ResNet: the last so many of each stage instead, from res2 to the last one built; [0, 1, 1, 3]
    # is the official release's FPN. []: NUM_LAYERS counts.
    cfg.MODEL.DEFORM.NUM_LAYERS_PER_STAGE = []
    # True: every tap also has a learnt factor (DCNv2); it starts at 0.5.
    cfg.MODEL.DEFORM.MODULATED = False
    # Groups of channels, each with offsets of its own. The paper's figures fit 1; the authors'
    # released detectors have 4.
    cfg.MODEL.DEFORM.NUM_GROUPS = 1
    # ResNet: dilation of the convolutions that predict the offsets. 0: that of the convolution they
    # serve (the paper); 1 in the official release's DeepLab.
    cfg.MODEL.DEFORM.OFFSET_DILATION = 0
    # ResNet: True begins the stem's pooling at the map's corner, as Caffe and the official release
    # do; False pads it, Detectron2's way, which looks two pixels further up and left.
    cfg.MODEL.DEFORM.STEM_POOL_AT_CORNER = False

    # Dilation of res4's 3x3 convolutions, any number from 1; above 1 the stage keeps its stride
    # at 1. So does MODEL.RESNETS.RES5_DILATION, Detectron2's own key, in this backbone.
    # Detectron2's DeepLab project adds the same key with the same default.
    if "RES4_DILATION" not in cfg.MODEL.RESNETS:
        cfg.MODEL.RESNETS.RES4_DILATION = 1

    # ------------------------------------------------------------------------ #
    # R-FCN, ROI_HEADS.NAME "RFCNROIHeads". Bins on a side: ROI_BOX_HEAD.POOLER_RESOLUTION;
    # its feature map: ROI_HEADS.IN_FEATURES; the proposals': RPN.IN_FEATURES
    # ------------------------------------------------------------------------ #
    cfg.MODEL.RFCN = CfgNode()
    # Channels of the 1x1 convolution between the backbone and the position-sensitive maps
    cfg.MODEL.RFCN.CONV_DIM = 1024
    # Deformable (True) or rigid position-sensitive RoI pooling
    cfg.MODEL.RFCN.DEFORM_POOL = True
    # Samples on a side of each bin: 4 means 4 x 4
    cfg.MODEL.RFCN.SAMPLING_RATIO = 4
    # Bins move by GAMMA x learnt offset x RoI size
    cfg.MODEL.RFCN.GAMMA = 0.1
    # True: continuous coordinates as Detectron2's ROIAlignV2. False: the official release's
    # rounding, for weights trained with it.
    cfg.MODEL.RFCN.ALIGNED = True

    # ------------------------------------------------------------------------ #
    # Faster R-CNN with deformable RoI pooling, ROI_HEADS.NAME "DeformROIHeads": Detectron2's
    # StandardROIHeads, in which ROI_BOX_HEAD.POOLER_TYPE may also be "DeformRoIPool"
    # ------------------------------------------------------------------------ #
    cfg.MODEL.DEFORM_ROI_HEADS = CfgNode()
    # Channels of the 1x1 convolution between the backbone and the box head's pooling; 0: none, as
    # with FPN, whose maps are narrow already
    cfg.MODEL.DEFORM_ROI_HEADS.CONV_DIM = 256
    # Bins move by GAMMA x learnt offset x RoI size
    cfg.MODEL.DEFORM_ROI_HEADS.GAMMA = 0.1
    # As RFCN.ALIGNED, for POOLER_TYPE "DeformRoIPool"
    cfg.MODEL.DEFORM_ROI_HEADS.ALIGNED = True
    # Outputs of hidden layers of the offset branch; the paper has none, MMDetection's "dpool"
    # models have [1024, 1024]
    cfg.MODEL.DEFORM_ROI_HEADS.OFFSET_FC_DIMS = []

    # ------------------------------------------------------------------------ #
    # Online hard example mining, in RFCNROIHeads and DeformROIHeads
    # ------------------------------------------------------------------------ #
    cfg.MODEL.OHEM = CfgNode()
    # True: all proposals are scored, and only those with the largest losses are learnt from;
    # ROI_HEADS.BATCH_SIZE_PER_IMAGE and POSITIVE_FRACTION are not used then
    cfg.MODEL.OHEM.ENABLED = False
    # How many are learnt from, per image
    cfg.MODEL.OHEM.BATCH_SIZE_PER_IMAGE = 128

    # ------------------------------------------------------------------------ #
    # META_ARCHITECTURE "CategoryAwareRPN". Anchors, their matching and sampling: ANCHOR_GENERATOR
    # and RPN; classes, score threshold and NMS at test: ROI_HEADS
    # ------------------------------------------------------------------------ #
    cfg.MODEL.CATEGORY_AWARE_RPN = CfgNode()
    # Channels of the 1x1 convolution between the backbone and the predictors
    cfg.MODEL.CATEGORY_AWARE_RPN.CONV_DIM = 1024

    # ------------------------------------------------------------------------ #
    # META_ARCHITECTURE "ImageClassifier", as which a backbone is pre-trained (docs/pretraining.md)
    # ------------------------------------------------------------------------ #
    cfg.MODEL.IMAGE_CLASSIFIER = CfgNode()
    # The backbone's map that is averaged and classified
    cfg.MODEL.IMAGE_CLASSIFIER.IN_FEATURE = "res5"
    # DATASETS.IMAGE_FOLDER, where it is used, sets it to the folder's
    cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES = 1000
    # Share of the target that is spread evenly over all classes
    cfg.MODEL.IMAGE_CLASSIFIER.LABEL_SMOOTHING = 0.0
    # Residual blocks start as their shortcuts: the last norm of each starts at zero
    cfg.MODEL.IMAGE_CLASSIFIER.ZERO_INIT_RESIDUAL = False
    # The square that it sees. In training a random part of the picture, aspect 3/4 to 4/3, mirrored
    # as INPUT.RANDOM_FLIP says; at test the middle of the picture, whose shorter side is brought to
    # INPUT.MIN_SIZE_TEST.
    cfg.INPUT.CLASSIFICATION = CfgNode()
    # Its side, in pixels
    cfg.INPUT.CLASSIFICATION.CROP_SIZE = 224
    # The least share of the picture's area that it shows in training
    cfg.INPUT.CLASSIFICATION.MIN_CROP_AREA = 0.08

    # ------------------------------------------------------------------------ #
    # Testing: what is done with a network's boxes. Multi-scale testing is Detectron2's TEST.AUG
    # ------------------------------------------------------------------------ #
    cfg.TEST.SOFT_NMS = CfgNode()
    # True: scores of overlapping boxes are lowered instead of the boxes dropped
    cfg.TEST.SOFT_NMS.ENABLED = False
    # "gaussian" or "linear"; "linear" starts at ROI_HEADS.NMS_THRESH_TEST
    cfg.TEST.SOFT_NMS.METHOD = "gaussian"
    # Of the Gaussian: score x exp(-IoU^2 / SIGMA); 0.6 in the official release's FPN
    cfg.TEST.SOFT_NMS.SIGMA = 0.6
    cfg.TEST.BOX_VOTING = CfgNode()
    # True: a box that survives becomes the mean of its class's boxes that overlap it, weighted by
    # their scores
    cfg.TEST.BOX_VOTING.ENABLED = False
    # How much they must overlap
    cfg.TEST.BOX_VOTING.IOU_THRESH = 0.5
    # Rounds of localisation before the vote: 1 votes on the boxes as they are, 2 pools once more
    # from the regressed boxes and votes on both rounds' boxes (not for CategoryAwareRPN)
    cfg.TEST.BOX_VOTING.NUM_ROUNDS = 2

    # ------------------------------------------------------------------------ #
    # Solver
    # ------------------------------------------------------------------------ #
    # "SGD" or "ADAMW"
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning-rate factor of every layer that predicts offsets. None: 1 with SGD (the paper),
    # 0.05 with AdamW, under which offsets run away at 1.
    cfg.SOLVER.OFFSET_LR_FACTOR = None
    # The same for the offset layers of RoI pooling alone. None: as OFFSET_LR_FACTOR. The paper
    # has 0.01 for Faster R-CNN's fully connected one.
    cfg.SOLVER.ROI_OFFSET_LR_FACTOR = None
    # Learning-rate factor of R-FCN's new 1x1 convolution; 3 in the official release
    cfg.SOLVER.NEW_CONV_LR_FACTOR = 1.0
    # Where SOLVER.REFERENCE_WORLD_SIZE makes the batch k times larger: True divides WEIGHT_DECAY
    # by k too, the rule of the official release's summed gradients (d2_deform/engine/scaling.py).
    cfg.SOLVER.SCALE_WEIGHT_DECAY = False

    # ------------------------------------------------------------------------ #
    # Data: a folder of one's own in PASCAL VOC's layout
    # ------------------------------------------------------------------------ #
    cfg.DATASETS.VOC_FOLDER = CfgNode()
    # The folder with Annotations/, ImageSets/Main/ and JPEGImages/. Each ImageSets/Main/<split>.txt
    # becomes the data set "voc_folder_<split>". "": none.
    cfg.DATASETS.VOC_FOLDER.ROOT = ""
    # Text file with one class name a line, in the order of their numbers. "": the classes that the
    # annotations name, sorted.
    cfg.DATASETS.VOC_FOLDER.CLASSES_FILE = ""
    # True: boxes marked difficult are not learnt from, as in the official release. The evaluator
    # neither rewards nor punishes them in either case.
    cfg.DATASETS.VOC_FOLDER.SKIP_DIFFICULT = False

    # ------------------------------------------------------------------------ #
    # Data: a folder of classified pictures in ImageNet's layout
    # ------------------------------------------------------------------------ #
    cfg.DATASETS.IMAGE_FOLDER = CfgNode()
    # The folder with <split>/<class>/<picture>; its <split> is the data set "image_folder_<split>".
    # "": none.
    cfg.DATASETS.IMAGE_FOLDER.ROOT = ""
