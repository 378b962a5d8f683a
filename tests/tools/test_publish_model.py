"""tools/publish_model.py: the package's own files come out of it."""

import pytest

from d2_deform import model_zoo
from d2_deform.engine import ConfigError


def test_published_weights_give_the_same_file_again(tool, tmp_path, capsys):
    published = model_zoo.get_checkpoint_url("quickstart.yaml")
    words = ["--config", "quickstart.yaml", "--weights", published, "--output", str(tmp_path)]
    path = tool("publish_model").main(words)
    assert path.parent == tmp_path and published.endswith(path.name)
    with open(published, "rb") as file:
        assert path.read_bytes() == file.read()
    assert f"{path.name}: 1.87 MB" in capsys.readouterr().out


def test_refuses_weights_of_another_network(tool, tmp_path):
    main = tool("publish_model").main
    other = model_zoo.get_checkpoint_url("Deformed-Digits/deeplab_thin_R_18_dconv3.yaml")
    words = ["--weights", other, "--output", str(tmp_path)]
    with pytest.raises(ConfigError, match="is another network's"):
        main(["--config", "quickstart.yaml", *words])
    with pytest.raises(ConfigError, match=r"--config quickstart: .*no config of this name"):
        main(["--config", "quickstart", *words])
    assert not list(tmp_path.iterdir())
