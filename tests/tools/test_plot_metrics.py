"""tools/plot_metrics.py: reads what Detectron2 writes, draws it, says what it lacks."""

import json

import cv2
import numpy as np
import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from d2_deform.visualization.training_curves import (
    MetricsError,
    choose_keys,
    draw_training_curves,
    name_runs,
    read_metrics,
    smooth,
)


@pytest.fixture(scope="module")
def plot(tool):
    return tool("plot_metrics")


def write_run(folder, iterations=100, start=0, **results):
    """As Detectron2's trainer writes it; several calls on one folder add to it."""
    folder.mkdir(exist_ok=True, parents=True)
    writer = JSONWriter(str(folder / "metrics.json"))
    with EventStorage(start) as storage:
        for iteration in range(start, iterations):
            storage.put_scalars(total_loss=1 / (iteration + 1), lr=0.1, smoothing_hint=False)
            storage.put_scalar(
                "offset/backbone.res5.2.conv2_offset/mean", 0.5, smoothing_hint=False
            )
            if iteration % 20 == 19:
                writer.write()
            storage.step()
        for key, value in results.items():
            storage.put_scalar(f"bbox/{key}", value, smoothing_hint=False)
        writer.write()
    writer.close()
    return folder


def test_draws_runs_beside_each_other(plot, tmp_path, capsys):
    runs = [write_run(tmp_path / "a", AP50=40.0), write_run(tmp_path / "b" / "metrics", 60)]
    output = tmp_path / "curves.png"
    plot.main([str(runs[0]), str(runs[1] / "metrics.json"), "--output", str(output)])
    assert capsys.readouterr().out.splitlines() == [
        "a: iteration 100, total_loss 0.01, bbox/AP50 40",
        "metrics: iteration 59, total_loss 0.01667",
        f"4 metric(s) of 2 run(s): {output}",
    ]
    picture = cv2.imread(str(output))
    height, width = picture.shape[:2]
    assert 3 * 400 < width < 3 * 500 and height > 500  # three columns, two rows
    for colour in ((178, 114, 0), (0, 94, 213)):  # BGR; both runs are there
        assert (picture == colour).all(axis=2).sum() > 100


def test_reads_what_was_written(tmp_path):
    run = read_metrics(str(write_run(tmp_path, AP50=40.0, AP=20.0)))
    assert run["total_loss"].iterations.tolist() == [19, 39, 59, 79, 99]
    np.testing.assert_allclose(run["total_loss"].values, [1 / 20, 1 / 40, 1 / 60, 1 / 80, 0.01])
    assert [one.tolist() for one in run["bbox/AP50"]] == [[100], [40.0]]


def test_a_resumed_run_overwrites_what_it_repeats(tmp_path):
    write_run(tmp_path, 100)
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('{"iteration": 119, "total_lo\n')  # killed while it wrote
    write_run(tmp_path, 80, start=40)
    run = read_metrics(str(tmp_path))
    assert run["lr"].iterations.tolist() == [19, 39, 59, 79]


def test_nan_is_read(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 19, "total_loss": NaN}\n')
    assert np.isnan(read_metrics(str(tmp_path))["total_loss"].values).tolist() == [True]


def test_smoothing():
    values = np.array([4.0, 0.0, 2.0, 4.0, 9.0])
    np.testing.assert_allclose(smooth(values, 3), [4.0, 2.0, 2.0, 5.0, 9.0])
    np.testing.assert_allclose(smooth(values, 5), [4.0, 2.0, 3.8, 5.0, 9.0])
    assert smooth(values, 1).tolist() == values.tolist()


def test_nan_is_not_spread_by_smoothing():
    values = np.array([1.0, 1.0, np.nan, 1.0, 1.0, 1.0])
    assert np.isnan(smooth(values, 3)).tolist() == [False, True, True, True, False, False]


def run_with(*keys):
    return dict.fromkeys(keys)


def test_default_keys():
    offsets = [f"offset/res4.{i}/mean" for i in (0, 1, 2, 9, 10, 11, 12)]
    run = run_with("lr", "time", "loss_cls", "total_loss", "offset/res4.12/max", *reversed(offsets))
    other = run_with("voc_2007_test/bbox/AP50", "bbox/AP", "bbox/AP50-cat", "sem_seg/mIoU")
    assert choose_keys([run, other]) == [
        *("total_loss", "loss_cls", "lr", "bbox/AP", "voc_2007_test/bbox/AP50", "sem_seg/mIoU"),
        *offsets[1:],
    ]
    assert choose_keys([run_with("time")]) == ["time"]


def test_named_keys():
    run = run_with("bbox/AP", "bbox/AP50", "lr")
    assert choose_keys([run], ["lr", "bbox/*", "bbox/AP"]) == ["lr", "bbox/AP", "bbox/AP50"]
    with pytest.raises(MetricsError, match=r"no run has loss; there are bbox/AP, bbox/AP50, lr"):
        choose_keys([run], ["lr", "loss"])
    with pytest.raises(MetricsError, match=r"61 metrics are more than one figure holds"):
        choose_keys([run_with(*map(str, range(61)))], ["*"])


def test_names_tell_runs_apart():
    assert name_runs(["x/a", "x/b/metrics.json"]) == ["a", "b"]
    assert name_runs(["x/run", "y/run/"]) == ["x/run", "y/run"]
    with pytest.raises(MetricsError, match=r"x/run is given twice"):
        name_runs(["x/run", "x/run/metrics.json"])


def test_figure_has_a_panel_for_each_key(tmp_path):
    runs = {name: read_metrics(str(write_run(tmp_path / name, 1200))) for name in "ab"}
    figure = draw_training_curves(runs, ["total_loss", "lr"], window=9)
    loss, rate = figure.axes
    assert loss.get_title() == "total_loss"
    assert len(loss.lines) == 4  # pale and smoothed
    assert len(rate.lines) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_messages(plot, tmp_path):
    run = str(write_run(tmp_path / "a"))
    output = tmp_path / "curves.png"
    with pytest.raises(MetricsError, match=r"there is no .*nowhere; name the folder of a run"):
        plot.main([run, str(tmp_path / "nowhere"), "--output", str(output)])
    with pytest.raises(MetricsError, match=r"--output .*metrics.json: expected a file ending in"):
        plot.main([run, "--output", f"{run}/metrics.json"])
    with pytest.raises(MetricsError, match=r"--output .*b/c.png: there is no such folder"):
        plot.main([run, "--output", str(tmp_path / "b" / "c.png")])
    (tmp_path / "notes.json").write_text(json.dumps([1, 2]))
    with pytest.raises(MetricsError, match=r"notes.json holds no line of Detectron2's metrics"):
        plot.main([str(tmp_path / "notes.json"), "--output", str(output)])
    assert not output.exists()
