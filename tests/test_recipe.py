"""Proves that the shipped recipes load, what `--set` reaches, and that all faults are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.recipe import Recipe, load, variables

SHIPPED = sorted((Path(__file__).parents[1] / "jobs" / "recipes").glob("*.yaml"))

SMALL = """
name: small
labeled: {kind: synthetic, count: 40}
pool:
  - {kind: synthetic, count: 100}
  - {kind: folder, path: $FACES/raw}
"""
MASKED = (
    SMALL
    + """
pretrain:
  method: mae
  model:
    name: vit_tiny_patch16_224
    size: 16
    args: {img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}
"""
)


@pytest.fixture(autouse=True)
def _faces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FACES", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)


def small(tmp_path: Path, *sets: str, text: str = SMALL) -> Recipe:
    file = tmp_path / "small.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file, sets)


def faults(tmp_path: Path, *sets: str, text: str = SMALL) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        small(tmp_path, *sets, text=text)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_load__every_shipped_recipe(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = file.read_text(encoding="utf-8")
    for name in re.findall(r"\$\{?(\w+)", re.sub(r"(?m)#.*$", "", text)):
        monkeypatch.setenv(name, str(tmp_path))
    recipe = load(file)
    assert recipe.name == file.stem
    assert "$" not in str(recipe.model_dump(mode="json"))
    head = text[: text.index("\nname:")]
    assert all(word in head for word in ("Expected:", "Launch:"))


def test_load__resolved_recipe_loads_again(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    again = small(tmp_path, text=yaml.safe_dump(recipe.model_dump(mode="json")))
    assert again == recipe


@pytest.mark.parametrize(
    ("item", "read"),
    [
        ("seed=7", lambda r: r.seed == 7),
        ("guard.neighbors=7", lambda r: r.guard.neighbors == 7),
        ("pool.0.count=600", lambda r: r.pool[0].count == 600),
        ("pool.1.crop.fraction=0.5", lambda r: r.pool[1].crop.fraction == 0.5),
        ("run=s3://b/c=d", lambda r: r.run == "s3://b/c=d"),
        ("teach={folds: 3, steps: 9}", lambda r: (r.teach.folds, r.teach.steps) == (3, 9)),
        ("student.source_share={synthetic0: 0.25}", lambda r: len(r.student.source_share) == 1),
        ("embed.flip=off", lambda r: r.embed.flip is False),
        ("removals=$FACES/gone.txt", lambda r: str(r.removals).endswith("/gone.txt")),
        ("pool=[{kind: synthetic, count: 5}]", lambda r: len(r.pool) == 1),
    ],
)
def test_set__reaches(tmp_path: Path, item: str, read) -> None:
    assert not read(small(tmp_path))
    assert read(small(tmp_path, item))


def test_set__last_one_wins(tmp_path: Path) -> None:
    assert small(tmp_path, "seed=1", "seed=2").seed == 2


def test_set__empty_value_is_off(tmp_path: Path) -> None:
    assert small(tmp_path, "run=here", "run=").run is None


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("seed", "expected KEY.PATH=VALUE"),
        ("=3", "expected KEY.PATH=VALUE"),
        ("pool.2.count=3", "'2' does not lead into a list of 2"),
        ("pool.first.count=3", "'first' does not lead into a list of 2"),
        ("name.first=3", "'first' does not lead into a plain value"),
        ("seed=[1, 2", "the value is not YAML"),
    ],
)
def test_set__cannot_be_applied(tmp_path: Path, item: str, said: str) -> None:
    (line,) = faults(tmp_path, item)
    assert line.startswith(f"--set {item!r}: ")
    assert said in line


@pytest.mark.parametrize(
    ("item", "line"),
    [
        ("sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("guard.neighbours=1", "unknown key 'guard.neighbours'; did you mean 'neighbors'?"),
        ("labeled.cuont=1", "unknown key 'labeled.synthetic.cuont'; did you mean 'count'?"),
        ("pool.1.crop.fractoin=1", "'pool.1.folder.crop.fractoin'; did you mean 'fraction'?"),
    ],
)
def test_set__unknown_key_gets_the_nearest(tmp_path: Path, item: str, line: str) -> None:
    (told,) = faults(tmp_path, item)
    assert told.startswith("small.yaml: ")
    assert told.endswith(line)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("select.adaptive.rule=softmatch", "'fixed', 'ada_cm', 'dtm', 'flexmatch', 'freematch' or"),
        ("select.adaptive={tua: 1}", "unknown key 'select.adaptive.tua'; did you mean 'tau'?"),
        ("select={policy: all, adaptive: {rule: dtm}}", "policy all has no thresholds"),
        ("select.clusters.outvoted=keep", "Input should be 'relabel' or 'leave'"),
        ("select.clusters.count=0", "greater than or equal to 1 (given 0)"),
        ("search.adaptive=[{rule: softmatch}]", "Input should be 'fixed', 'ada_cm'"),
        ("student.online={thresholds: {rule: remixmatch}, low: negative}", "leaves no face below"),
        ("student.online.anchors=9", "less than or equal to 8 (given 9)"),
        ("pretrain.method=byol", "Input should be 'simclr', 'moco' or 'mae'"),
        ("pretrain.method=moco", "moco's keys come from the average of the weights"),
        ("student.source_share={synthetc0: 0.25}", "'synthetc0'; did you mean 'synthetic0'?"),
        ("student.source_share={synthetic0: 25}", "less than or equal to 1 (given 25)"),
        ("student.rescore_at=[50]", "less than 1 (given 50)"),
        ("student.rescore_at=[0]", "greater than 0 (given 0)"),
        ("student.betas=[0.9, 1.5]", "less than 1 (given 1.5)"),
        ("pretrain.betas=[0.9, 1.5]", "less than 1 (given 1.5)"),
        ("evaluate.large=[hapiness]", "class name 'hapiness'; did you mean 'happiness'?"),
        ("train.stage_workers={techer: 4}", "'techer' trains nothing; did you mean 'teach'?"),
        ("train.stage_workers={teach: -1}", "greater than or equal to 0 (given -1)"),
        ("select.adaptive={rule: dtm, tau: 0.8}", "tau: dtm has no use for it"),
        ("select.confidence=95", "expected confidences from 0 to 1 (given 95"),
        ("select.confidence={fear: 95}", "expected confidences from 0 to 1"),
        ("select.confidence={angry: 0.5}", "class name 'angry'; did you mean 'anger'?"),
        ("select={policy: all, confidence: 0.5}", "confidence: policy all has no thresholds"),
        (
            "select={policy: all, target_precision: 0.8}",
            "target_precision: policy all has no thresholds",
        ),
        (
            "select={adaptive: {rule: dtm}, target_precision: 0.8}",
            "target_precision: adaptive finds the cuts in its place",
        ),
        ("embed.pool=[4, 1]", "expected the fewest and the most actors, from 1 up"),
        ("score.pool=[0, 1]", "expected the fewest and the most actors, from 1 up"),
        ("labeled.crop.margin=0.2", "no box is cut out; set box: true"),
        ("search.seed=7", "search.seed: the search takes the recipe's seed, 0"),
        ("search.adaptive=[{rule: dtm}, {rule: dtm, floor: 0.5}]", "two rules are dtm"),
        (
            "teach.partial.decoder={width: 10}",
            "partial.decoder: width: 10 is no multiple of 4 head",
        ),
        ("search.head.l2=0.1", "no head judges the objective balanced"),
    ],
)
def test_load__says_what_a_policy_or_method_may_be(tmp_path: Path, item: str, said: str) -> None:
    (line,) = faults(tmp_path, item)
    assert said in line


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ("decoder.heads=5", "pretrain.decoder: width: 512 is no multiple of 4 and of 5 heads"),
        ("decoder={width: 6, heads: 2}", "width: 6 is no multiple of 4 and of 2 heads"),
        ("model.size=20", "pretrain.model: vit_tiny_patch16_224: faces of 20 px do not fit: Input"),
        (
            "model.size=18 model.args.img_size=18",
            "pretrain.model: vit_tiny_patch16_224 sees patches of 4 px, and faces of 18 px are not",
        ),
        ("model.args.patch_size=16", "pretrain.mask_ratio: 0.75 of 1 patches hides none"),
        ("mask_ratio=0.05", "pretrain.mask_ratio: 0.05 of 16 patches hides none"),
        ("mask_ratio=1", "pretrain.mask_ratio: Input should be less than 1"),
        (
            "model={size: 32}",
            "timm's vision transformers, such as vit_tiny_patch16_224; got Compac",
        ),
        ("model={name: test_resnet}", "timm's vision transformers"),
        ("model.name=vit_tinny_patch16_224", "one of timm's; did you mean 'vit_tiny_patch16_224'?"),
        ("model.args.num_heads=5", "do not fit: dim should be divisible by num_heads"),
        ("method=simclr model.size=20", "faces of 20 px do not fit: Input height (20) doesn't"),
        ("method=simclr model={name: resnet81}", "no network 'resnet81'"),
        (
            "model={weights: timm, pretraining_data: photos}",
            "pretrain.model: weights: timm has no compact_resnet; name a weights file instead",
        ),
    ],
)
def test_load__a_pretraining_that_could_not_begin(tmp_path: Path, items: str, said: str) -> None:
    assert small(tmp_path, text=MASKED).pretrain is not None
    sets = [f"pretrain.{item}" for item in re.split(r" (?=\w+[.=])", items)]
    (line,) = faults(tmp_path, *sets, text=MASKED)
    assert said in line


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("teach.model.name=resnet81", "teach.model: no network 'resnet81'"),
        ("student.model={name: vit_tiny_patch16_224}", "student.model: vit_tiny_patch16_224: face"),
        ("student.model={name: coat_tiny, size: 224}", "student.model: coat_tiny: gives lists of"),
        (
            "teach.model.args={depth: 3}",
            "teach.model: compact_resnet: args {'depth': 3} do not fit",
        ),
        ("distill={net: {name: convnet, size: 48, args: {depth: 9}}}", "distill.net: convnet: "),
        (
            "active={train: {model: {name: levit_128}}}",
            "active.train.model: LevitDistilled: the clas",
        ),
    ],
)
def test_load__a_network_that_cannot_be_built(tmp_path: Path, item: str, said: str) -> None:
    (line,) = faults(tmp_path, item)
    assert said in line


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("train.workers=3", "teach.batch: 128 cannot be shared evenly by 3 workers"),
        ("train.stage_workers={student: 3}", "student.labeled_batch: 64 cannot be shared evenly"),
        ("student.mined_batch=127", "student.mined_batch: 127 cannot be shared evenly by 2"),
        ("train.stage_workers={pretrain: 7}", "pretrain.batch: 256 cannot be shared evenly by 7"),
        ("train.stage_workers={student_share: 5}", "student.labeled_batch: 64 cannot be shared ev"),
    ],
)
def test_load__batches_that_workers_cannot_share(tmp_path: Path, item: str, said: str) -> None:
    sets = ("train.workers=2", "pretrain={model: {size: 32}}", "mined_share=0.1")
    assert small(tmp_path, *sets).train.workers == 2
    (line,) = faults(tmp_path, *sets, item)
    assert said in line


def test_load__all_faults_at_once(tmp_path: Path) -> None:
    sets = ("sed=1", "labeled.fraction=1.5", "teach.folds=many", "pool.0.count=-1")
    told = faults(tmp_path, *sets)
    for named in ("'sed'", "labeled.synthetic.fraction", "teach.folds", "pool.0.synthetic.count"):
        assert sum(named in line for line in told) == 1, told
    assert len(told) == 4


def test_load__variables_that_are_missing_are_told_with_all_else(tmp_path: Path) -> None:
    told = faults(tmp_path, "removals=$NOWHERE/a", "run=$ELSEWHERE/$NOWHERE", "sed=1", "seed")
    assert [line.split(": ", 1)[-1] for line in told] == [
        "expected KEY.PATH=VALUE",
        "recipe names $NOWHERE, which the environment does not define",
        "recipe names $ELSEWHERE, which the environment does not define",
        "unknown key 'sed'; did you mean 'seed'?",
    ]
    with pytest.raises(ConfigError, match=r"\$NOWHERE.*\n.*\$ELSEWHERE"):
        variables(tmp_path / "small.yaml", ["removals=$NOWHERE/$ELSEWHERE"])


def test_load__a_key_that_is_there_twice(tmp_path: Path) -> None:
    text = f"{SMALL}teach: {{folds: 3}}\nembed:\n  batch: 1\n  batch: 2\nteach: {{steps: 9}}\n"
    assert faults(tmp_path, "survey={threads: 1, threads: 2}", text=text) == [
        "small.yaml: key 'batch' is in line 9 and in line 10; keep one",
        "small.yaml: key 'teach' is in line 7 and in line 11; keep one",
        "--set 'survey={threads: 1, threads: 2}': key 'threads' is in line 1 and in line 1; "
        "keep one",
    ]


def test_load__a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    merged = "teach: {model: &a {size: 32, color: gray}}\n"
    merged += "student: {model: &b {<<: *a, size: 24}}\ncontrol: {}\n"
    merged += "pretrain: {model: {<<: *b, size: 16}}\n"
    recipe = small(tmp_path, text=SMALL + merged)
    assert recipe.pretrain is not None
    assert (recipe.student.model.size, recipe.pretrain.model.size) == (24, 16)


def test_load__missing_variable(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, "removals=${NOWHERE}/gone.txt")
    assert "$NOWHERE" in line


def test_load__distilled_faces_are_what_the_teacher_sees() -> None:
    line = "distill.net: gray faces of 32 px; the teacher gives the soft labels and sees gray"
    with pytest.raises(ConfigError, match=line):
        load(Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml", ["distill.net.size=32"])


def test_load__a_student_sees_the_color_of_the_set_it_learns_from() -> None:
    demo = Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml"
    small, rgb = "student.model={name: convnet, size: 32}", "student.model.color=rgb"
    load(demo, [small, rgb])
    load(demo, [small, "student.beside=distilled"])  # views resize
    line = "student.beside: the distilled set is gray, student.model sees rgb faces"
    with pytest.raises(ConfigError, match=line):
        load(demo, [small, rgb, "student.beside=distilled"])


@pytest.mark.parametrize(
    "unread",
    ["confidence=0.5", "prototype=true", "neighbors=0.5", "target_precision=0.9", "policy=rules"],
)
def test_load__a_search_reads_no_threshold_of_select(tmp_path: Path, unread: str) -> None:
    (line,) = faults(tmp_path, "search={}", f"select.{unread}")
    assert f"select.{unread.split('=')[0]}: search finds" in line
    assert "say search=null" in line
    assert small(tmp_path, "search=null", f"select.{unread}").search is None
    stored = small(tmp_path, "search={}", "select.group_cap=20").model_dump(mode="json")
    assert small(tmp_path, text=yaml.safe_dump(stored)).select.group_cap == 20


def test_load__no_source_is_drawn_beside_the_distilled_set(tmp_path: Path) -> None:
    sets = ("student.source_share={synthetic0: 0.5}", "student.beside=distilled", "distill.ipc=1")
    (line,) = faults(tmp_path, *sets, "distill.net.size=48")
    assert "beside the distilled set no source is drawn" in line


def test_load__sources_of_one_name(tmp_path: Path) -> None:
    assert list(small(tmp_path).sources()) == ["synthetic0", "folder1"]
    (line,) = faults(tmp_path, "pool.0.name=raw", "pool.1.name=raw")
    assert "two sources are named 'raw'" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [1, 2", "small.yaml: not YAML: "),
        ("- 1\n- 2\n", "a recipe is a mapping of settings, got list"),
        ("", "a recipe is a mapping of settings, got NoneType"),
    ],
)
def test_load__not_a_recipe(tmp_path: Path, text: str, said: str) -> None:
    (line,) = faults(tmp_path, text=text)
    assert said in line


def test_load__no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such recipe"):
        load(tmp_path / "gone.yaml")


def test_load__a_folder_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="directory"):
        load(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match=r"image\.yaml: not text"):
        load(tmp_path / "image.yaml")


def test_load__a_share_of_mined_faces_needs_a_student_that_sees_them() -> None:
    demo = Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml"
    assert load(demo, ["mined_share=0.1"]).mined_share == 0.1
    with pytest.raises(ConfigError, match="mined_share: beside the distilled set"):
        load(demo, ["mined_share=0.1", "student.beside=distilled"])


@pytest.mark.parametrize("changed", ["tune={steps: 5}", "student.beside=distilled"])
def test_load__what_learns_from_a_distilled_set_needs_one(changed: str) -> None:
    demo = Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml"
    name = changed.split("=")[0]
    with pytest.raises(ConfigError, match=f"{name}: there is no distilled set"):
        load(demo, ["tune=null", "distill=null", changed])
