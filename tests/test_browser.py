"""The widgets in a real JupyterLab, clicked in a headless Chromium: what is seen, heard, reached by keyboard and read aloud."""

import re
import subprocess
import sys

import pytest
from browser import CELLS, is_blank, lab, make_embeddings, make_runs, running_lab  # noqa: F401 - lab and running_lab are fixtures

ERROR = "Error displaying widget"


def check(notebook):
    "What holds for every widget: named, reached by Tab in order, readable at 200%, no errors, nothing from other machines."
    assert notebook.unnamed() == []
    assert notebook.unreached() == []
    with notebook.zoomed(2):
        assert notebook.too_wide() == []
    assert ERROR not in notebook.text()
    # of a player that was emptied, Chromium says that no byte of nothing can be loaded
    assert [error for error in notebook.errors if "ERR_REQUEST_RANGE_NOT_SATISFIABLE" not in error] == []
    assert notebook.abroad == []


def enter(field, text):
    "Type a text and say that it is complete."
    field.fill(text)
    field.press("Enter")


def images(notebook):
    return notebook.output().locator("img:visible")


def players(notebook):
    return notebook.output().locator("audio:visible")


def alt(notebook, i=0):
    return images(notebook).nth(i).get_attribute("alt")


@pytest.mark.parametrize("place", ["lab/tree", "notebooks"], ids=["JupyterLab", "Notebook 7"])
def test_card(lab, place):  # noqa: F811
    notebook = lab.open([CELLS["card"]], place)
    assert re.fullmatch(r"waveform and mel spectrogram of \w+, 2\.\d\d s at 8000 Hz", alt(notebook))
    assert not is_blank(images(notebook).screenshot())
    assert notebook.is_playing(players(notebook))
    notebook.shot("card")
    check(notebook)


def test_blank():
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (300, 100), "white").save(file, "PNG")
    assert is_blank(file.getvalue())


def test_nothing_leaves_the_machine(lab):  # noqa: F811
    notebook = lab.open(["from IPython.display import HTML\nHTML('<img src=\"http://example.org/x.png\" alt=\"x\">')"])
    notebook.wait(lambda: notebook.errors, "the picture is not found")
    assert notebook.abroad == ["http://example.org/x.png"] and "ERR_NAME_NOT_RESOLVED" in notebook.errors[0]


@pytest.fixture(scope="module")
def executed(running_lab):  # noqa: F811
    "A notebook with a card as papermill leaves it in the server's folder."
    source = running_lab.write([CELLS["card"]])
    path = running_lab.root / "executed.ipynb"
    command = [sys.executable, "-m", "w2v2nb", "papermill", str(running_lab.root / source), str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return path


def test_papermill(lab, executed):  # noqa: F811
    notebook = lab.view(executed.name)
    notebook.wait(lambda: images(notebook).count() == 1, "the static form is shown")
    assert "waveform and mel spectrogram" in notebook.text() and not is_blank(images(notebook).screenshot())
    assert "buttercup" in notebook.text() and ERROR not in notebook.text()


def test_html(lab, executed):  # noqa: F811
    command = [sys.executable, "-m", "nbconvert", "--to", "html", str(executed)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    notebook = lab.page()
    notebook.page.goto(executed.with_suffix(".html").as_uri())
    assert not is_blank(notebook.page.locator("img").screenshot())
    text = notebook.page.inner_text("body")
    assert "buttercup" in text and ERROR not in text


@pytest.mark.parametrize("place", ["lab/tree", "notebooks"], ids=["JupyterLab", "Notebook 7"])
@pytest.mark.parametrize("is_trusted", [True, False])
def test_reopened(lab, is_trusted, place):  # noqa: F811
    notebook = lab.open([CELLS["card"].removesuffix("card") + "display(card)\nprint('and then')"], place)
    assert images(notebook).count() == players(notebook).count() == 1, "the static form is hidden while there is a widget"
    notebook.command("docmanager:save")
    lab.end_kernels()
    path = lab.root / notebook.name
    if not is_trusted:  # as if from somebody else
        path.write_text(path.read_text().replace("and then", "and now"))
    again = lab.view(notebook.name, place)
    again.wait(lambda: images(again).count() == 1, "the static form is shown", 10)
    assert "buttercup" in again.text() and ERROR not in again.text() and "and " in again.text()
    again.shot(f"reopened-{is_trusted}")


def test_table(lab):  # noqa: F811
    notebook = lab.open([CELLS["table"]])
    box, lines = notebook.output(), notebook.output().locator(".w2v2nb-rows option")
    n_all, field = lines.count(), box.get_by_label("uid contains")
    lines.nth(1).click()
    notebook.wait(lambda: images(notebook).count(), "the picture is shown")
    assert not is_blank(images(notebook).screenshot()) and notebook.is_playing(players(notebook))
    first = alt(notebook)
    lines.nth(2).click()
    notebook.wait(lambda: images(notebook).count() and alt(notebook) != first, "another picture is shown")
    box.get_by_role("button", name="as the model hears it").click()
    notebook.wait(lambda: images(notebook).count() and "16000 Hz" in alt(notebook), "what the model hears is shown")
    notebook.shot("table")
    enter(field, "no such")
    notebook.wait(lambda: lines.count() == 0, "nothing is listed")
    enter(field, "")
    notebook.wait(lambda: lines.count() == n_all, "everything is listed")
    box.get_by_role("button", name="Measure").click()
    notebook.wait(lambda: f"{n_all} of {n_all} recordings measured" in notebook.text(), "all are measured")
    notebook.wait(lambda: box.get_by_text("level (dBFS)").is_visible(), "there is a filter of levels")
    check(notebook)


def test_transforms(lab):  # noqa: F811
    notebook = lab.open([CELLS["transforms"]])
    box, after = notebook.output(), images(notebook).nth(1)
    assert images(notebook).count() == players(notebook).count() == 2
    before = after.get_attribute("src")
    box.get_by_label("noise", exact=True).check()
    notebook.wait(lambda: after.get_attribute("src") != before, "the noise is seen")
    assert "Change('noise'" in box.locator("pre:visible").inner_text().replace("effect=", "")
    assert not is_blank(after.screenshot()) and notebook.is_playing(players(notebook).nth(1))
    notebook.shot("transforms")
    check(notebook)


def test_annotate(lab):  # noqa: F811
    path = lab.root / "ratings.csv"
    path.unlink(missing_ok=True)
    notebook = lab.open([CELLS["annotate"]])
    notebook.output().get_by_label("Key").focus()
    for key in "42":
        shown = notebook.text()
        notebook.page.keyboard.press(key)
        notebook.wait(lambda shown=shown: notebook.text() != shown, "the next question is shown")
    notebook.wait(lambda: re.search(r"\b4\b.*\b2\b", path.read_text().splitlines()[1]), "both ratings are saved")
    assert notebook.is_playing(players(notebook))
    notebook.output().get_by_label("show the picture").check()
    notebook.wait(lambda: images(notebook).count(), "the picture is shown")
    assert not is_blank(images(notebook).screenshot())
    notebook.shot("annotate")
    check(notebook)


@pytest.fixture(scope="module")
def extracted(running_lab):  # noqa: F811
    make_embeddings(running_lab.root)


def drag(notebook, canvas, corners):
    "Draw around something; corners are shares of width and height."
    place, mouse = canvas.bounding_box(), notebook.page.mouse
    points = [(place["x"] + x * place["width"], place["y"] + y * place["height"]) for x, y in corners]
    mouse.move(*points[0])
    mouse.down()
    for point in points[1:]:
        mouse.move(*point, steps=20)
    mouse.up()


@pytest.mark.parametrize("place", ["lab/tree", "notebooks"], ids=["JupyterLab", "Notebook 7"])
def test_embeddings(lab, place, extracted):  # noqa: F811
    notebook = lab.open([CELLS["embeddings"]], place)
    box, canvas, points = notebook.output(), notebook.output().locator("canvas").first, notebook.output().get_by_label("Points")
    notebook.wait(lambda: not is_blank(canvas.screenshot()), "the map is drawn")
    n_all = points.locator("option").count()
    box.get_by_label("Colour by").select_option("task")
    notebook.wait(lambda: box.get_by_text("sentence").first.is_visible(), "there is a legend")
    box.get_by_title("Activate lasso selection").click()
    drag(notebook, canvas, [(0.1, 0.02), (0.5, 0.02), (0.5, 0.98), (0.1, 0.98), (0.1, 0.02)])
    notebook.wait(lambda: 0 < points.locator("option").count() < n_all, "the lasso selects")
    points.locator("option").first.click()
    notebook.wait(lambda: images(notebook).count(), "the point is shown")
    assert not is_blank(images(notebook).screenshot()) and notebook.is_playing(players(notebook))
    first = alt(notebook)
    box.get_by_label("Nearest to it").locator("option").first.click()
    notebook.wait(lambda: images(notebook).count() and alt(notebook) != first, "its neighbour is shown")
    notebook.shot("embeddings")
    box.get_by_role("button", name="Select it and these").click()
    notebook.wait(lambda: points.locator("option").count() == 11, "the neighbours are selected")
    before = canvas.screenshot()
    box.get_by_label("Map", exact=True).select_option("UMAP")
    notebook.wait(lambda: "computing the map by UMAP" in notebook.text(), "the map is computed in the background")
    notebook.wait(lambda: "11 of 11 selected points" in notebook.text(), "the map is drawn")
    notebook.wait(lambda: box.locator("canvas").first.screenshot() != before, "it is another one")
    check(notebook)


@pytest.fixture(scope="module")
def runs(running_lab):  # noqa: F811
    make_runs(running_lab.root)


def test_errors(lab, runs):  # noqa: F811
    notebook = lab.open([CELLS["errors"]])
    box = notebook.output()
    box.get_by_label("Label").select_option("strained")
    box.get_by_label("Recording").locator("option").first.click()
    notebook.wait(lambda: images(notebook).count(), "the picture is shown")
    assert notebook.is_playing(players(notebook))
    box.get_by_role("button", name="Which second").click()
    notebook.wait(lambda: images(notebook).count() == 2, "the scores of the seconds are shown")
    seconds, marked = box.get_by_label("Second", exact=True), alt(notebook, 1)
    lines = [line.replace("\xa0", " ") for line in seconds.locator("option").all_inner_texts()]
    seconds.select_option(index=next(i for i, line in enumerate(lines) if line not in marked))
    notebook.wait(lambda: alt(notebook, 1) != marked, "another second is marked", 15)
    assert not is_blank(images(notebook).nth(1).screenshot()) and notebook.is_playing(players(notebook).last)
    notebook.shot("errors")
    check(notebook)


def test_compare(lab, runs):  # noqa: F811
    notebook = lab.open([CELLS["compare"]])
    assert "epochs" in notebook.text() and not is_blank(images(notebook).screenshot())
    notebook.output().get_by_label("Label").select_option("strained")
    notebook.wait(lambda: "strained" in alt(notebook), "the curves of the label are shown")
    notebook.shot("compare")
    check(notebook)


def test_form(lab):  # noqa: F811
    notebook = lab.open([CELLS["form"]])
    box = notebook.output()
    field, run = box.get_by_label("epochs", exact=True), box.get_by_role("button", name="Run")
    enter(field, "0")
    notebook.wait(run.is_disabled, "the value is judged")
    assert "should be greater than 0" in box.get_by_role("alert").first.inner_text()
    enter(field, "3")
    notebook.wait(run.is_enabled, "the values are right")
    assert "--epochs=3" in notebook.text()
    notebook.shot("form")
    check(notebook)
    run.click()
    body = notebook.page.locator("body")  # the last output is now the one inside the form
    notebook.wait(lambda: "finished; the run's folder is" in body.inner_text(), "the run has finished")
    assert (lab.root / "formed" / "run.json").exists()
