"""The look of figures, the bytes that a notebook stores, and the output that `show` leaves in a notebook."""

import base64
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from papercore.lab import figures

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
plt = pytest.importorskip("matplotlib.pyplot")


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    with figures.style():
        fig, ax = plt.subplots()
        for i in range(5):
            ax.plot(np.arange(80), rng.normal(size=80).cumsum(), **figures.series_style(i, points=80))
        ax.set(xlabel="step", ylabel="loss")
    return fig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


def test_png_is_quantised_opaque_and_of_the_text_column():
    image_module = pytest.importorskip("PIL.Image")
    fig = drawn()
    png = figures.png_bytes(fig)
    full = io.BytesIO()
    fig.savefig(full, format="png", dpi=150)
    plt.close(fig)
    with image_module.open(io.BytesIO(png)) as picture:
        assert picture.mode == "P" and "transparency" not in picture.info
        assert picture.width == round(6.3 * 150)
        rgb = picture.convert("RGB")
        assert len(rgb.getcolors(maxcolors=256)) <= 64
        assert rgb.getpixel((1, 1)) == (255, 255, 255)
    assert b"Software" not in png
    assert len(png) < 0.6 * len(full.getvalue())


def test_few_colours_keep_thin_lines_in_their_own_colour_beside_a_heat_map():
    image_module = pytest.importorskip("PIL.Image")
    x = np.linspace(-3, 3, 200)
    with figures.style():
        fig, (left, right) = plt.subplots(1, 2)
        left.imshow(np.exp(-(x[:, None] ** 2 + x**2) / 3))
        for i in range(len(figures.COLOURS)):
            right.plot([0, 1], [0, i + 1], **figures.series_style(i))
    with image_module.open(io.BytesIO(figures.png_bytes(fig))) as picture:
        kept = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=256)}
    plt.close(fig)
    assert 64 < len(kept) <= 256, "shades of a heat map need more than 64 colours"
    for colour in figures.COLOURS:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert min(max(abs(a - b) for a, b in zip(wanted, have, strict=True)) for have in kept) <= 4


def test_png_is_the_same_for_the_same_figure_and_another_for_another():
    first, second, other = drawn(), drawn(), drawn(seed=1)
    try:
        assert figures.png_bytes(first) == figures.png_bytes(second)
        assert figures.png_bytes(first) != figures.png_bytes(other)
    finally:
        plt.close("all")


def test_show_writes_the_picture_and_closes_the_figure(folder):
    fig = drawn()
    figures.show(fig, "fig-loss", alt="Loss falls.", caption="Loss over steps.")
    assert [path.name for path in folder.iterdir()] == ["fig-loss.png"]
    assert (folder / "fig-loss.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.fignum_exists(fig.number)


def test_show_without_jupyter_and_folder_draws_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("PAPERCORE_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    figures.show(drawn(), "fig-loss", alt="Loss falls.", caption="Loss over steps.")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alt": "  "}, "alt is empty"),
        ({"caption": ""}, "caption is empty"),
        ({"name": "../escape"}, "letters, digits, hyphens"),
        ({"name": ""}, "letters, digits, hyphens"),
    ],
)
def test_show_refuses_what_a_reader_would_miss(folder, change, message):
    arguments = {"name": "fig-loss", "alt": "Loss falls.", "caption": "Loss over steps."} | change
    fig = drawn()
    with pytest.raises(ValueError, match=message):
        figures.show(fig, arguments.pop("name"), **arguments)
    plt.close(fig)
    assert not folder.exists()


def test_show_refuses_what_is_no_figure():
    with pytest.raises(TypeError, match="give the matplotlib figure"):
        figures.show([1, 2], "fig-loss", alt="a", caption="b")


def test_style_holds_inside_its_block_only():
    before = matplotlib.rcParams["axes.grid"], list(matplotlib.rcParams["figure.figsize"])
    with figures.style(height=4.0):
        assert list(matplotlib.rcParams["figure.figsize"]) == [figures.WIDTH, 4.0]
        assert matplotlib.rcParams["axes.grid"] is True
    assert (matplotlib.rcParams["axes.grid"], list(matplotlib.rcParams["figure.figsize"])) == before
    sizes = [
        value
        for key, value in figures.style().items()
        if key.split(".")[1] in ("size", "labelsize", "fontsize")
    ]
    assert len(sizes) == 5 and all(9 <= size <= 10 for size in sizes)


def test_series_differ_without_colour_and_reported_markers_are_hollow():
    looks = [figures.series_style(i) for i in range(len(figures.COLOURS))]
    assert len({look["marker"] for look in looks}) == len(looks)
    assert len({str(look["linestyle"]) for look in looks}) == len(looks)
    assert figures.series_style(len(looks)) == looks[0]
    for index in (None, 0, 3):
        look = figures.reported_style(index)
        assert look["markerfacecolor"] == "white" and look["linestyle"] == "none"
        assert look["markeredgecolor"] != "white"
    assert figures.reported_style(3)["marker"] == looks[3]["marker"]
    with pytest.raises(ValueError, match="counted from 0"):
        figures.series_style(-1)


def _contrast(one, other):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_can_be_seen_on_white():
    assert min(_contrast(colour, "#ffffff") for colour in figures.COLOURS) > 2.0
    assert min(_contrast(colour, "#ffffff") for colour in figures.COLOURS[:3]) > 3.0


@pytest.mark.parametrize(("spread", "divisor"), [("sd", 1.0), ("se", 2.0)])
def test_band_is_mean_and_spread_over_seeds(spread, divisor):
    runs = np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0], [7.0, 0.0]])
    fig, ax = plt.subplots()
    sentence = figures.band(ax, [10, 20], runs, label="MeZO", spread=spread)
    (line,), (area,) = ax.lines, ax.collections
    assert line.get_ydata().tolist() == [4.0, 3.0]
    at_10 = area.get_paths()[0].vertices
    at_10 = at_10[at_10[:, 0] == 10][:, 1]
    # the sample variance of 1, 3, 5, 7 is 20 / 3
    half = np.sqrt(20 / 3) / divisor
    assert [at_10.min(), at_10.max()] == pytest.approx([4 - half, 4 + half])
    assert "4 seeds" in line.get_label() and "4 seeds" in sentence
    assert ("error" in sentence) == (spread == "se")
    plt.close(fig)


def test_band_of_the_range_and_of_one_seed():
    fig, ax = plt.subplots()
    assert "least" in figures.band(ax, [0, 1], [[0, 1], [2, 5]], label="a", spread="range")
    area = ax.collections[0].get_paths()[0].vertices
    assert area[:, 1].min() == 0 and area[:, 1].max() == 5
    assert "one seed" in figures.band(ax, [0, 1], [0.0, 1.0], label="b", index=1)
    assert len(ax.collections) == 1
    plt.close(fig)


def test_band_refuses_diverged_seeds_and_wrong_shapes():
    fig, ax = plt.subplots()
    with pytest.raises(ValueError, match=r"seed rows \[1\]"):
        figures.band(ax, [0, 1], [[0, 1], [2, np.nan]], label="a")
    with pytest.raises(ValueError, match="same T"):
        figures.band(ax, [0, 1, 2], [[0, 1], [2, 3]], label="a")
    with pytest.raises(ValueError, match="'sd', 'se', 'range'"):
        figures.band(ax, [0, 1], [[0, 1]], label="a", spread="iqr")
    plt.close(fig)


def test_import_loads_neither_matplotlib_nor_ipython():
    code = (
        "import json, sys; import papercore.lab.figures, papercore.lab.scoreboard;"
        "print(json.dumps([m for m in ('matplotlib', 'IPython', 'ipywidgets', 'PIL') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


CELL = """
import matplotlib.pyplot as plt
from papercore.lab import figures
with figures.style():
    fig, ax = plt.subplots()
    ax.plot([0, 1], [1, 0], label="loss", **figures.series_style(0))
figures.show(fig, "fig-loss", alt="Loss falls from one to zero.", caption="Loss, *one* seed.")
"""
EXPLORE_CELL = """
def line(slope=2):
    return figures.Plot([0, 1], {"y": [0, slope]}, "x", "y", text=f"slope {slope}")
figures.explore(line, name="play", alt="A line.", caption="Its slope.", slope=[1, 2, 3])
"""

MOVE_CELL = """
import gc, ipywidgets
of_kind = lambda kind: next(w for w in gc.get_objects() if type(w) is kind)
slider, output = of_kind(ipywidgets.SelectionSlider), of_kind(ipywidgets.Output)
pictures = []
for place in (1, 2, 1):
    slider.value = place
    pictures.append(output.outputs[0]["data"]["image/png"])
print(pictures[0] != pictures[1], pictures[0] == pictures[2])
slider.value = 2
"""


@pytest.fixture(scope="module")
def outputs():
    """The cells above with their outputs, run by a real kernel."""
    nbformat = pytest.importorskip("nbformat", reason="the notebook libraries are not installed")
    nbclient = pytest.importorskip("nbclient", reason="the notebook libraries are not installed")
    pytest.importorskip("ipykernel", reason="there is no kernel to run a notebook")
    pytest.importorskip("ipywidgets", reason="without ipywidgets there are no live controls")
    cells = [nbformat.v4.new_code_cell(source) for source in (CELL, EXPLORE_CELL, MOVE_CELL)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120).execute()
    return notebook


def test_show_under_a_kernel_leaves_one_picture_and_its_caption(outputs):
    picture, caption = outputs.cells[0].outputs
    assert set(picture.data) == {"image/png", "text/plain"}
    assert base64.b64decode(picture.data["image/png"]).startswith(b"\x89PNG")
    assert picture.data["text/plain"] == "Loss falls from one to zero."
    assert picture.metadata == {
        "image/png": {"alt": "Loss falls from one to zero."},
        "papercore": {
            "name": "fig-loss",
            "alt": "Loss falls from one to zero.",
            "caption": "Loss, *one* seed.",
        },
    }
    assert caption.data == {"text/markdown": "Loss, *one* seed."}
    assert caption.metadata == {"papercore": {"role": "caption"}}


def test_explore_under_a_kernel_is_one_bundle_of_controls_and_page(outputs):
    (bundle,) = outputs.cells[1].outputs
    view = "application/vnd.jupyter.widget-view+json"
    assert set(bundle.data) == {view, "text/html", "text/plain"}
    assert bundle.metadata == {"papercore": {"role": "explore", "name": "play"}}
    state = outputs.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    box = state[bundle.data[view]["model_id"]]["state"]
    shown = [state[child.removeprefix("IPY_MODEL_")] for child in box["children"]]
    assert [child["model_name"] for child in shown] == [
        *("SelectionSliderModel", "OutputModel", "HTMLModel", "HTMLMathModel")
    ]
    assert shown[0]["state"]["_options_labels"] == ["1", "2", "3"] and shown[0]["state"]["index"] == 2
    assert set(shown[1]["state"]["outputs"][0]["data"]) == {"image/png", "text/plain"}
    assert shown[2]["state"]["value"] == "slope 3"


def test_moving_a_live_control_draws_the_other_setting(outputs):
    (printed,) = outputs.cells[2].outputs
    assert printed.text == "True True\n"
