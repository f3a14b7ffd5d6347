"""embedding_map: the same map each time, neighbours among the embeddings, all of it without a mouse, odd tables told."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import pairwise_distances

from w2v2nb import samples
from w2v2nb.config import configure
from w2v2nb.embedding_map import PointList, embeddings
from w2v2nb.folder import RunFolder
from w2v2nb.maps import find_neighbours, plot_map, project, read_embeddings, stack
from w2v2nb.run import start
from w2v2nb.table import as_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "An extraction of two layers."
    place = tmp_path_factory.mktemp("run") / "out"
    table = f"{samples.split_root()}/test.csv"
    given = dict(prefix=samples.prefix(), data_split_root=table, checkpoint=samples.checkpoint(), layer="0,1")
    start(configure("extraction", **given, exp_dir=place, dataset="demo"))
    return place


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    group = np.repeat(["a", "b"], 20)
    vectors = rng.normal(size=(40, 8)) + np.where(group == "b", 3, -3)[:, None]
    return pd.DataFrame({"uid": [f"{i:03}" for i in range(40)], "group": group, "embedding": list(vectors.astype(np.float32))})


@pytest.mark.parametrize("method", ["PCA", "UMAP"])
def test_a_map_keeps_groups_apart_and_is_the_same_each_time(table, method):
    places = project(stack(table), method)
    assert places.shape == (40, 2) and np.isfinite(places).all()
    np.testing.assert_array_equal(places, project(stack(table), method))
    centers = [places[table["group"] == name].mean(axis=0) for name in "ab"]
    spread = max(places[table["group"] == name].std() for name in "ab")
    assert np.linalg.norm(centers[0] - centers[1]) > 2 * spread


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_neighbours_are_the_nearest_embeddings(table, distance):
    vectors = stack(table)
    near = find_neighbours(vectors, 7, 5, distance)
    distances = pairwise_distances(vectors, metric=distance)[7]
    order = [i for i in np.argsort(distances) if i != 7][:5]
    assert near["row"].tolist() == order
    np.testing.assert_allclose(near["distance"], distances[order], rtol=1e-6, atol=1e-6)


def test_a_run_s_layers_are_choices_and_annotations_are_colours(folder):
    view = embeddings(folder, samples.prefix(), annotations=f"{samples.split_root()}/test.csv")
    assert view.controls.layer.options == ("embedding_0", "embedding_1")
    assert {"slow rate", "task"} <= {value for _, value in view.controls.color.options}
    before = view.plane.places
    view.controls.layer.value = "embedding_1"
    assert not np.allclose(before, view.plane.places)
    parquet = RunFolder(folder) / "embeddings.parquet"
    assert read_embeddings(parquet)["uid"].tolist() == read_embeddings(RunFolder(folder))["uid"].tolist()


def test_a_selection_is_a_table_and_a_point_is_heard(folder):
    view = embeddings(folder, samples.prefix(), annotations=f"{samples.split_root()}/test.csv")
    view.plane.scatter.widget.selection = np.array([4, 2])  # what a lasso sets
    assert view.selection["uid"].tolist() == view.table["uid"].iloc[[4, 2]].tolist()
    assert len(view.points.pick.options) == 2 and not view.points.card.player.value
    view.points.pick.value = 4
    assert view.points.card.uid == view.table["uid"][4] and view.points.card.player.value[:4] == b"RIFF"
    assert len(view.points.neighbours.pick.options) == 10
    view.points.neighbours.pick.index = 0
    assert view.points.card.uid == view.table["uid"][view.points.neighbours.pick.value] != view.table["uid"][4]


def test_a_new_map_or_colour_keeps_what_is_selected_and_picked(table):
    view = embeddings(table)
    view.points.select([5, 7])
    view.points.pick.value = 7
    for control, value in ((view.controls.color, "group"), (view.controls.distance, "euclidean")):
        before = view.plane.scatter
        control.value = value
        assert view.plane.scatter is not before and view.plane.scatter.selection().tolist() == [5, 7]
        assert view.points.rows == [5, 7] and view.points.pick.value == 7
    expected = find_neighbours(stack(table), 7, distance="euclidean")["row"].tolist()
    assert [row for _, row in view.points.neighbours.pick.options] == expected
    view.points.neighbours.mark.click()
    assert view.points.rows == view.plane.scatter.selection().tolist() == [7, *expected]


def test_one_selected_point_is_shown(folder):
    view = embeddings(folder, samples.prefix())
    view.plane.scatter.widget.selection = np.array([6])  # what a click sets
    assert view.points.card.uid == view.table["uid"][6] and view.points.card.player.value[:4] == b"RIFF"


def test_umap_does_not_hold_up_the_notebook():
    rng = np.random.default_rng(0)
    view = embeddings(pd.DataFrame({"uid": [str(i) for i in range(3000)], "embedding": list(rng.normal(size=(3000, 4)))}))
    pca = view.plane.places
    view.controls.method.value = "UMAP"
    assert view.worker.is_alive() and "computing the map by UMAP" in view.points.notice.value
    view.points.pick.value = 5  # meanwhile one goes on
    assert len(view.points.neighbours.pick.options) == 10 and view.plane.places is pca
    view.worker.join()
    umap = view.plane.places
    assert umap.shape == (3000, 2) and not np.allclose(umap, pca) and "500 of 3000" in view.points.notice.value
    view.controls.method.value = "PCA"
    assert view.plane.places is pca, "a map is computed once"


def test_unknown_numbers_are_not_drawn_as_zero(table):
    view = embeddings(table.assign(age=np.where(np.arange(40) < 30, np.arange(40) + 50.0, np.nan)))
    view.controls.color.value = "age"
    assert view.plane.scatter.filter().tolist() == [*range(30)]


def test_thousands_of_points_make_one_short_list():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"uid": [str(i) for i in range(5000)], "embedding": list(rng.normal(size=(5000, 4)))})
    view = embeddings(table)
    assert len(view.points.pick.options) == PointList.n_listed
    assert "500 of 5000 points" in view.points.notice.value


def test_windows_of_one_recording_are_points_of_their_own(table):
    table = table.assign(uid="w", start_s=np.arange(40) / 2, end_s=np.arange(40) / 2 + 1)
    view = embeddings(table)
    assert view.points.pick.options[3][0].startswith("w from 1.5 s")
    view.points.pick.value = 3
    assert len(view.points.neighbours.pick.options) == 10


@pytest.mark.parametrize("column", [None, "group", "number", "many", "holes", "gaps"])
def test_the_static_form_is_a_map_that_is_not_blank(table, column):
    number, is_known = pd.Series(np.arange(40.0)), pd.Series(np.arange(40) > 9)
    more = dict(number=number, holes=number.where(is_known), many=number.map("n{:g}".format), gaps=table["group"].where(is_known))
    view = embeddings(table.assign(**more))
    view.controls.color.value = column or ""
    assert '<img alt="PCA of 40 points"' in view.static()
    picture = plot_map(view.plane.places, view.points.values)
    assert sum(len(points.get_offsets()) for points in picture.axes[0].collections) == 40


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.drop(columns="embedding"), "should have uid and embedding"),
        (lambda t: t.drop(columns="uid"), "should have uid and embedding"),
        (lambda t: t.head(2), "three or more"),
        (lambda t: t.assign(embedding=[None, *t["embedding"][1:]]), "missing or not finite for 1 rows, such as 000"),
        (lambda t: t.assign(embedding=[np.full(8, np.nan), *t["embedding"][1:]]), "missing or not finite"),
        (lambda t: t.assign(embedding=[np.zeros(3), *t["embedding"][1:]]), "different lengths"),
    ],
)
def test_what_is_no_table_of_embeddings_is_told(table, change, words):
    with pytest.raises(ValueError, match=words):
        embeddings(change(table))


def test_uids_stay_text(table):
    found = read_embeddings(table, as_table(pd.DataFrame({"uid": ["000", "001"], "age": [50, 60]})))
    assert found["uid"][0] == "000" and found["age"].notna().sum() == 2
