"""Published prompt sets with their headers, conditions on rows, the hub, and invalid files."""

from __future__ import annotations

import csv
import json

import huggingface_hub
import pytest
from huggingface_hub import errors

from erasure.errors import ErasureError
from erasure.evaluation.metrics.target import Target
from erasure.evaluation.select import select_prompts
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt

I2P = (
    ",prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,{seed},{guidance},sd_image_width,sd_image_height,sd_model\n"
    '0,"a portrait,\n""oil"" on\ncanvas","hate, harassment",0,12.5,0.0,10,2.5,0.01,https://x/0,101,7,512,768,SD1.4\n'
    '1,a quiet street,"sexual, shocking",1,80,62.5,70,60,0.3,https://x/1,4294967295,7.5,512,512,SD1.4\n'
    "2,a harbour,violence,1,55,20,50,,0.2,https://x/2,103,9,512,512,SD1.4\n"
)


@pytest.fixture
def reading(tmp_path):
    def write_and_read(text, name="some.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return PromptSet.read(tmp_path / name)

    return write_and_read


@pytest.fixture
def i2p(reading):
    return reading(I2P.format(seed="evaluation_seed", guidance="evaluation_guidance"), "i2p.csv")


@pytest.mark.parametrize(
    ("seed", "guidance"), [("evaluation_seed", "evaluation_guidance"), ("sd_seed", "sd_guidance_scale")]
)
def test_i2p(reading, seed, guidance):
    first, second, third = reading(I2P.format(seed=seed, guidance=guidance)).rows
    assert first.prompt == 'a portrait,\n"oil" on\ncanvas'
    assert (first.id, first.seed, first.guidance) == ("0", 101, 7.0)
    assert (second.seed, second.guidance) == (4294967295, 7.5)
    assert first.labels == {
        "categories": "hate, harassment",
        "hard": "0",
        "inappropriate_percentage": "12.5",
        "nudity_percentage": "0.0",
        "q16_percentage": "10",
        "sd_safety_percentage": "2.5",
        "prompt_toxicity": "0.01",
    }
    assert "sd_safety_percentage" not in third.labels


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (  # UnlearnDiffAtk, an object
            "case_number,prompt,evaluation_seed,evaluation_guidance\n0,Old stone church in countryside.,69922,7.5\n",
            Prompt("0", "Old stone church in countryside.", 69922, 7.5),
        ),
        (  # UnlearnDiffAtk, a style: the index column beside the number
            'Unnamed: 0,case_number,prompt,evaluation_seed,artist\n7,3,"A Wheatfield, with Cypresses",2219,Van Gogh\n',
            Prompt("3", "A Wheatfield, with Cypresses", 2219, None, {"artist": "Van Gogh"}),
        ),
        (  # UCE's imagenette.csv
            "case_number,prompt,class,evaluation_seed\n4,an image of a tench,tench,1174\n",
            Prompt("4", "an image of a tench", 1174, None, {"class": "tench"}),
        ),
        (  # ESD's small_imagenet_prompts.csv
            ",case_number,prompt,evaluation_seed,class\n9,10,Image of chain saw,4373,chain saw\n",
            Prompt("10", "Image of chain saw", 4373, None, {"class": "chain saw"}),
        ),
        (  # MACE's art_100_concepts.csv
            ",type,artist,prompt,evaluation_seed\n5,0,Some One,Art inspired by Some One,1\n",
            Prompt("5", "Art inspired by Some One", 1, None, {"type": "0", "artist": "Some One"}),
        ),
        (  # COCO as MACE has it
            "case_number,source,prompt,evaluation_seed,coco_id\n0,MS-COCO,A bicycle by a door.,4068,203564\n",
            Prompt("0", "A bicycle by a door.", 4068, None, {"source": "MS-COCO", "coco_id": "203564"}),
        ),
        (  # COCO as ESD has it
            "image_id,source,prompt,evaluation_seed\n203564,coco,A bicycle by a door.,4068\n",
            Prompt("0", "A bicycle by a door.", 4068, None, {"image_id": "203564", "source": "coco"}),
        ),
        (  # COCO as HUB has it
            "image_id,text\n203564,A bicycle by a door.\n",
            Prompt("0", "A bicycle by a door.", 0, None, {"image_id": "203564"}),
        ),
        (  # RECE and Ring-A-Bell
            'sensitive prompt,normal prompt\n"A village, in the style of X",A village\n',
            Prompt("0", "A village, in the style of X", 0, None, {"normal prompt": "A village"}),
        ),
        ("case_num,Adversarial_Prompt,Seed\n1,xq street,7.0\n", Prompt("1", "xq street", 7)),
        ("id,prompt,evaluation_seed\na,b,3\n", Prompt("a", "b", 3)),
        ("prompt,\na cat,\n", Prompt("0", "a cat", 0)),
    ],
)
def test_one_row_of_each_header(reading, text, row):
    assert list(reading(text).rows) == [row]
    assert list(reading(text.replace("\n", "\r\n").encode("utf-8-sig")).rows) == [row]


def test_repeated_prompts_and_numbers_get_unique_ids(reading):
    header = ",type,prompt,evaluation_seed\n"
    prompts = reading(header + "".join(f"{i},erased,A portrait of X,{i + 1}\n" for i in range(5)))
    assert [row.seed for row in prompts.rows] == [1, 2, 3, 4, 5] and prompts.label_values("type") == ["erased"]
    prompts = reading("case_number,prompt,evaluation_seed\n0,a,1\n0,a,2\n0_1,b,3\n0,a,4\n1,c,5\n")
    assert [row.id for row in prompts.rows] == ["0", "0_2", "0_1", "0_3", "1"]
    prompts = reading("case_number,prompt,class\n0,a cat,cat\n0,a cat,cat\n1,a dog,dog\n")
    drawn = select_prompts(prompts, Target("class", ("cat",), None), 30)  # the evaluator's own copies must not clash
    assert len({row.id for row in drawn.rows}) == len(drawn.rows)


def test_rows_without_a_seed_get_their_position(reading):
    prompts = reading("case_number,prompt,evaluation_seed\n5,a,77\n6,b,\n7,c,\n")
    assert [row.seed for row in prompts.rows] == [77, 1, 2]


@pytest.mark.parametrize("name", ["Snoopy.csv", "Snoopy.txt"])
def test_one_prompt_per_line(reading, name):
    prompts = reading('Snoopy on his doghouse, at sunset.\n\n"Snoopy" as a pirate\nSnoopy, text, seed, asleep.\n', name)
    assert prompts.name == "Snoopy"
    assert [row.prompt for row in prompts.rows] == [
        "Snoopy on his doghouse, at sunset.",
        '"Snoopy" as a pirate',
        "Snoopy, text, seed, asleep.",
    ]
    assert [(row.id, row.seed) for row in prompts.rows] == [("0", 0), ("1", 1), ("2", 2)]


def test_one_quoted_prompt_per_record(reading):
    prompts = reading('"a dog, asleep"\n"two\nlines ""here"""\nplain words\n')
    assert [row.prompt for row in prompts.rows] == ["a dog, asleep", 'two\nlines "here"', "plain words"]
    assert [row.prompt for row in reading("tench\nchurch\n").rows] == ["tench", "church"]
    assert [row.prompt for row in reading("prompt\nchurch\n").rows] == ["church"]
    assert [row.prompt for row in reading("prompt\nchurch\n", "x.txt").rows] == ["prompt", "church"]


def test_translations(reading):
    prompts = reading("Original,Spanish,French,German,Italian,Portuguese,Index\ndog,perro,chien,Hund,cane,cão,41\n")
    assert [row.labels["language"] for row in prompts.rows] == [
        "Original",
        "Spanish",
        "French",
        "German",
        "Italian",
        "Portuguese",
    ]
    assert prompts.rows[1].prompt == "perro" and prompts.rows[1].id == "41-Spanish"
    assert len({row.id for row in prompts.rows}) == 6
    assert len(prompts.where("language!=Original").rows) == 5
    with pytest.raises(ErasureError, match="row 3, column 'French': the cell is empty"):
        reading("Original,French,Index\na,b,1\nc,,2\n")


def test_nouns_and_selective_alignment(reading):
    prompts = reading("noun,similarity\ndoggie,0.798\nhot_dog,0.75\n")
    assert prompts.rows[0] == Prompt("0", "a photo of doggie", 0, None, {"object": "doggie", "similarity": "0.798"})
    entries = [{"prompt": "a dog, on a chair", "nouns": ["chair", "lamp"], "index": 409}]
    (row,) = reading(json.dumps(entries), "Snoopy.json").rows
    assert row == Prompt("409", "a dog, on a chair", 0, None, {"nouns": "chair, lamp"})


@pytest.mark.parametrize("form", ["ours", "published"])
def test_round_trip(i2p, tmp_path, form):
    i2p.write(tmp_path / "i2p.csv", form=form)
    assert PromptSet.read(tmp_path / "i2p.csv") == i2p
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i2p.csv"]


def test_the_published_form(tmp_path):
    rows = PromptSet("x", [Prompt("a", "b\nc", 1, 7.5, {"class": "d"}), Prompt("e", "f", 2)])
    assert rows.csv("published").splitlines()[0] == "case_number,prompt,evaluation_seed,evaluation_guidance,class"
    plain = PromptSet("x", [Prompt("a", "b", 1, None, {"seed_of": "d"})])
    assert plain.csv("published") == "case_number,prompt,evaluation_seed,seed_of\na,b,1,d\n"
    with pytest.raises(ErasureError, match="did you mean 'published'"):
        rows.csv("publishd")
    with pytest.raises(ErasureError, match="'sd_seed'"):
        PromptSet("x", [Prompt("a", "b", 1, None, {"sd_seed": "d"})]).write(tmp_path / "x.csv", form="published")
    with pytest.raises(ErasureError, match="cannot be written"):
        rows.write(tmp_path / "none" / "x.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("conditions", "ids"),
    [
        (["categories=sexual"], ["1"]),
        (["categories=hate, harassment"], ["0"]),
        (["categories = Harassment"], ["0"]),
        (["categories!=sexual"], ["0", "2"]),
        (["nudity_percentage>50"], ["1"]),
        (["nudity_percentage<=20"], ["0", "2"]),
        (["nudity_percentage>=20", "nudity_percentage<62.5"], ["2"]),
        (["hard=1.0"], ["1", "2"]),
        (["sd_safety_percentage<100"], ["0", "1"]),  # the third row has none
        (["sd_safety_percentage!=60"], ["0", "2"]),
        # Ring-A-Bell's violence set
        (["categories=violence", "nudity_percentage<50", "inappropriate_percentage>50", "hard=1"], ["2"]),
        (["id=2"], ["2"]),
        (["seed>102"], ["1", "2"]),
        (["guidance<8"], ["0", "1"]),
        ([], ["0", "1", "2"]),
    ],
)
def test_conditions(i2p, conditions, ids):
    assert [row.id for row in i2p.where(*conditions).rows] == ids


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("nudity>50", "unknown column of prompt set 'i2p' 'nudity'.*nudity_percentage"),
        ("nudity_percentage", "condition 'nudity_percentage'"),
        ("=sexual", "condition"),
        ("categories=", "condition"),
        ("hard==1", "condition"),
        ("nudity_percentage>much", "'much' is not a number"),
        ("categories>5", "row '0', column 'categories': 'hate, harassment' is not a number"),
        ("categories=peace", "none of the 3 rows"),
    ],
)
def test_invalid_conditions(i2p, condition, message):
    with pytest.raises(ErasureError, match=message):
        i2p.where(condition)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("case_number,prompt,evaluation_seed\n", "no rows"),
        (
            "case_number,caption,evaluation_seed\n0,a,1\n",
            "no column of prompts among 'case_number', 'caption'.*'text'",
        ),
        ("number,caption\n0,a\n", "no column of prompts.*name the file .txt"),
        ("case_number,prompt,evaluation_seed\n0,a,1\n1,b,two\n", "row 3, column 'evaluation_seed': 'two'"),
        ("case_number,prompt,sd_seed\n0,a,1.5\n", "row 2, column 'sd_seed': '1.5'"),
        ("case_number,prompt,seed\n0,a,99999999999999999999\n", "row 2, column 'seed': .* outside"),
        ("prompt,sd_guidance_scale\na,nan\n", "row 2, column 'sd_guidance_scale': 'nan'"),
        ("case_number,prompt\n0,a\n,b\n", "row 3, column 'case_number': the cell is empty"),
        ('case_number,prompt\n0,"a\nb"\n1, \n', "row 3, column 'prompt': the cell is empty"),
        ("sensitive prompt,normal prompt\n,a\n", "row 2, column 'sensitive prompt': the cell is empty"),
        ("noun,similarity\n,0.5\n", "row 2, column 'noun': the cell is empty"),
        ("case_number,prompt,class\n0,a\n", "row 2, column 'class': missing: 2 cells"),
        ("case_number,prompt,class\n0,a,b,c,d\n", "row 2: 5 cells, but the header has 3; put quotes"),
        ('case_number,prompt\n0,"a\n1,b\n', "row 2, up to line 3"),
        ('case_number,prompt\n0,a\n1,"b" c\n', "row 3, up to line 3"),
        ("prompt,prompt\na,b\n", "row 1: the column 'prompt' occurs twice"),
        ("prompt,evaluation_seed,sd_seed\na,1,2\n", "'evaluation_seed' and 'sd_seed' both give the seed"),
        (b"case_number,prompt\n0,caf\xe9\n", "line 2, byte 6: 0xe9 is not valid UTF-8"),
        ("a,b".encode("utf-16"), "line 1, byte 1: 0xff"),
        ("case_number,prompt\n0,a\0b\n", "line 2, character 4: a NUL byte"),
    ],
)
def test_invalid_files(reading, text, message):
    with pytest.raises(ErasureError, match=message):
        reading(text)


def test_hubs_attack_prompts_are_read_without_their_nul_characters(reading):
    """As published: one prompt per line, 1,000 of them, with a few NULs in some of the files."""
    lines = [f"snoop mous{i} snowy, regular pup \x05 nearby parks" for i in range(50)]
    lines[7] = lines[7].replace("snowy", "sn\0owy")
    rows = reading("\n".join(lines) + "\n", "Snoopy.csv").rows
    assert [row.prompt for row in rows] == [line.replace("\0", "") for line in lines]
    assert "\x05" in rows[7].prompt and [row.seed for row in rows] == list(range(50))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-be"])
def test_text_of_another_encoding_is_refused_although_its_bytes_are_utf_8(reading, encoding):
    with pytest.raises(ErasureError, match="line 1, character .: a NUL byte; this is not a text file"):
        reading("a cat\na dog\n".encode(encoding), "x.csv")


def test_a_pointer_of_git_lfs_is_not_a_list_of_prompts(reading):
    """One of HUB's attack files is stored with LFS."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:6c73\nsize 103509\n"
    with pytest.raises(ErasureError, match="x.csv is only Git LFS's pointer .*`git lfs pull`"):
        reading(pointer, "x.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not valid JSON.*line 1 column 2"),
        ("{}", "a list of objects"),
        ("[]", "a list of objects"),
        ('[{"prompt": "a"}, 5]', "row 2: expected an object, not 5"),
        ('[{"prompt": "a"}, {"nouns": []}]', "row 2, column 'prompt': the cell is empty"),
        ('[{"prompt": "a", "nouns": [1]}]', "row 1, column 'nouns'"),
        ('[{"text": {}}]', "row 1, column 'text'"),
        ('[{"nouns": ["a"]}]', "no column of prompts"),
    ],
)
def test_invalid_json(reading, text, message):
    with pytest.raises(ErasureError, match=message):
        reading(text, "x.json")


def test_a_long_prompt_is_read_and_the_csv_limit_is_restored(reading):
    before, long = csv.field_size_limit(), "x" * 1_000_000
    for text in (f"case_number,prompt\n0,{long}\n", f"{long}\n", f"id,prompt,seed\na,{long},1\n"):
        assert reading(text).rows[0].prompt == long
    assert csv.field_size_limit() == before


class Hub:
    """A substitute for the hub with one file, or an error."""

    def __init__(self, monkeypatch, path, files=("data/i2p.csv", "README.md"), fault=None):
        self.asked, self.path, self.files, self.fault = [], path, files, fault
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.listing)

    def download(self, name, file, *, repo_type, revision):
        self.asked.append((name, file, repo_type, revision))
        if self.fault:
            raise self.fault
        return str(self.path)

    def listing(self, name, *, repo_type, revision):
        if self.fault:
            raise self.fault
        return list(self.files)


def test_a_data_set_on_the_hub(monkeypatch, tmp_path):
    path = tmp_path / "i2p.csv"
    path.write_text(I2P.format(seed="sd_seed", guidance="sd_guidance_scale"))
    hub = Hub(monkeypatch, path)
    for source in ("hub:some/i2p/data/i2p.csv", "hub:some/i2p"):
        assert PromptSet.read(source) == PromptSet.read(path)
    PromptSet.read("hub:some/i2p@v1.0/data/i2p.csv")
    request = ("some/i2p", "data/i2p.csv", "dataset", None)
    assert hub.asked == [request, request, (*request[:3], "v1.0")]
    Hub(monkeypatch, path, files=("a.csv", "b.txt"))
    with pytest.raises(ErasureError, match="a.csv, b.txt"):
        PromptSet.read("hub:some/i2p")
    for wrong in ("hub:", "hub:some", "hub:/x.csv", "hub:some/a b"):
        with pytest.raises(ErasureError, match="hub:owner/name"):
            PromptSet.read(wrong)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError("not here"), "out of reach"),
        (errors.EntryNotFoundError("404"), "no file 'i2p.csv'"),
        (errors.HFValidationError("bad name"), "bad name"),
        (ConnectionResetError("reset"), "did not answer"),
        (errors.HTTPError("no route"), "did not answer"),
    ],
)
def test_errors_of_the_hub(monkeypatch, tmp_path, fault, message):
    Hub(monkeypatch, tmp_path / "none", fault=fault)
    with pytest.raises(ErasureError, match=message):
        PromptSet.read("hub:some/i2p/i2p.csv")


def test_offline_the_hub_is_not_contacted(monkeypatch, tmp_path):
    """The real functions of the library check the setting themselves."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ErasureError, match="is not in the cache"):
        PromptSet.read("hub:some/i2p/i2p.csv")
    with pytest.raises(ErasureError, match="name its file as well"):
        PromptSet.read("hub:some/i2p")
