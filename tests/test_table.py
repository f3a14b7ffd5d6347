"""table: uids stay text, both forms of the labels file, and wrong tables refused in one sentence."""

import pytest

from w2v2nb.data import read_targets
from w2v2nb.table import read_annotations, read_labels, separate_heads

# annotations


@pytest.mark.parametrize("uid", ["000123", "1e5", "NA", "None", "nan", "True", "study/000123", "1.0", "0x10", "ä b"])
def test_uid_and_subject_stay_text(write, uid):
    table = read_annotations(write(f"uid,subject,path,strained\n{uid},{uid},{uid},1\nother,,,0\n"))
    assert [table[column][0] for column in ("uid", "subject", "path")] == [uid] * 3
    assert table["subject"].isna()[1] and table["path"].isna()[1]


def test_grouping_column_is_text_and_others_are_as_pandas_reads_them(write):
    path = write("uid,pair,age,sex\n1,007,30,f\n2,,NA,m\n")
    table = read_annotations(path, group="pair")
    assert table["pair"][0] == "007" and table["pair"].isna()[1]
    assert table["age"][0] == 30 and table["age"].isna()[1] and list(table["sex"]) == ["f", "m"]
    assert read_annotations(path)["pair"][0] == 7


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfuid,strained\n000123,1\n",
        b" uid , strained \n 000123 , 1 \n",
        b'"uid","strained"\r\n"000123",1\r\n',
        b"uid,strained\n\n000123,1\n\n",
        b"uid,strained\n000123,1",
    ],
    ids=["byte order mark", "white space", "quotes and CRLF", "blank lines", "no last newline"],
)
def test_dialects(write, content):
    table = read_annotations(write(content))
    assert table["uid"].tolist() == ["000123"] and read_targets(table, ["strained"]).tolist() == [[1]]


def test_saved_row_index_is_carried_along(write):
    assert list(read_annotations(write(",uid,a\n0,01,1\n")).columns) == ["Unnamed: 0", "uid", "a"]


@pytest.mark.parametrize(
    "content, match",
    [
        ("", "no column uid; its columns are: none, the file is empty"),
        ("recording,strained\n1,1\n", "no column uid; its columns are: recording, strained"),
        ("uid;strained\n1;1\n", "separate columns by commas"),
        ("uid,strained\n", "no rows"),
        ("uid,strained\n1,1\n,0\n  ,1\n", "uid is empty in row 2, 3"),
        ("uid,strained\n1,1\n1,0\n", "uid 1 stands in more than one row.*--scale clinical"),
        ("uid,a,a\n1,1,0\n", "more than one column called a"),
        ("uid,a\n1,1\n2,1,0,0\n", "not a table of 2 columns"),
        ('uid,a\n1,"open\n', "not a table of 2 columns"),
        (b"uid,a\n\xff\xfe,1\n", "not UTF-8"),
    ],
)
def test_wrong_tables(write, content, match):
    with pytest.raises(ValueError, match=match) as e:
        read_annotations(write(content))
    assert "table.csv" in str(e.value) and "\n" not in str(e.value)


def test_many_repeated_uids_are_not_all_named(write):
    with pytest.raises(ValueError, match="uid 0, 1, 2, 3, 4 and 995 more stands"):
        read_annotations(write("uid\n" + "\n".join(map(str, list(range(1000)) * 2))))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.csv does not exist"):
        read_annotations(tmp_path / "nothing.csv")


# labels


@pytest.mark.parametrize(
    "content, expected",
    [
        ("a\nb\n", [["a", "b"]]),
        ("a", [["a"]]),
        ("\n a \n\n\tb c\r\n\n", [["a", "b c"]]),
        ("a,b\n", [["a", "b"]]),
        ("a,b\nc\n", [["a", "b"], ["c"]]),
        ("a\nb\nc,\n", [["a"], ["b"], ["c"]]),
        (" a , b ,\n\n,\n c\n", [["a", "b"], ["c"]]),
        (b"\xef\xbb\xbfa\n", [["a"]]),
    ],
)
def test_labels_files(write, content, expected):
    assert read_labels(write(content)) == expected
    assert separate_heads(expected) == [[label] for labels in expected for label in labels]


@pytest.mark.parametrize(
    "content, match",
    [("", "no label"), (" \n,\n", "no label"), ("a\nb\na\n", "holds a more than once"), ("a,b\nb\n", "holds b more than once")],
)
def test_wrong_labels_files(write, content, match):
    with pytest.raises(ValueError, match=match):
        read_labels(write(content))
