import re
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vs2_plugin.errors import ModelStringError, PluginError
from vs2_plugin.method import AUTOMATIC, COMMON, Method, Option
from vs2_plugin.modelstring import parse
from vs2_plugin.plugins import Registry, registry

TOY = Method(
    "toy",
    print,
    [
        Option("count", int, 3, minimum=1),
        Option("rule", str, "majority", choices=("majority", "query")),
        Option("word", str),
        Option("flag", bool, False),
        Option("ratio", float, 0.5),
    ],
    aliases=("toy++",),
)
PLAIN = Method("plain", print, needs_checkpoint=False)


@pytest.fixture(scope="module")
def known():
    return Registry(methods={"toy": TOY, "plain": PLAIN}, owners={"toy": "t", "plain": "t"}, aliases={"toy++": "toy"})


VALID = [
    # text, backbone, checkpoint, given
    ("toy:ViT-B-32", "ViT-B-32", None, {}),
    ("toy:ViT-B/32", "ViT-B/32", None, {}),
    ("toy:coca_ViT-L-14", "coca_ViT-L-14", None, {}),
    ("toy:ViT-B-32@mine", "ViT-B-32", "mine", {}),
    ("toy:ViT-B-32@runs/a b.v1+x", "ViT-B-32", "runs/a b.v1+x", {}),
    ("toy:ViT-B-32@~/saes/mine", "ViT-B-32", "~/saes/mine", {}),
    ("toy:ViT-B-32@hf:me/my-sae", "ViT-B-32", "hf:me/my-sae", {}),
    ("toy:hf-hub:a/b@hf:me/sae.2#refs/pr/1@count=7", "hf-hub:a/b", "hf:me/sae.2#refs/pr/1", {"count": 7}),
    ("toy:ViT-B-32@count=7", "ViT-B-32", None, {"count": 7}),
    ("toy:ViT-B-32@mine@count=7@ratio=-1e-3", "ViT-B-32", "mine", {"count": 7, "ratio": -0.001}),
    ("toy:ViT-B-32@rule=query@flag=true", "ViT-B-32", None, {"rule": "query", "flag": True}),
    ("toy:ViT-B-32@flag=0", "ViT-B-32", None, {"flag": False}),
    ("toy:ViT-B-32@word=a=b/c", "ViT-B-32", None, {"word": "a=b/c"}),
    ("toy:ViT-B-32@word=", "ViT-B-32", None, {"word": ""}),
    ("toy++:ViT-B-32", "ViT-B-32", None, {}),
    ("toy:hf-hub:laion/CLIP-ViT-B-32-laion2B", "hf-hub:laion/CLIP-ViT-B-32-laion2B", None, {}),
    ("toy:hf-hub:a/b@mine@count=1", "hf-hub:a/b", "mine", {"count": 1}),
    ("toy:local-dir:models/tiny clip", "local-dir:models/tiny clip", None, {}),
    (r"toy:local-dir:C:\models\tiny", r"local-dir:C:\models\tiny", None, {}),
    ("toy:local-dir:/a/b@mine", "local-dir:/a/b", "mine", {}),
]

INVALID = [
    # text, parts of the message: what is wrong, and what is accepted
    ("", ("no steering method", "method:backbone[@checkpoint][@key=value]...")),
    ("ViT-B-32", ("no steering method before a ':'", "vs2:ViT-B-32")),
    ("ViT-B-32@count=2", ("no steering method before a ':'",)),
    ("a@b:ViT-B-32", ("no steering method before a ':'",)),
    ("hf-hub:org/model", ("no steering method before a ':'", "vs2:hf-hub:org/model")),
    (":ViT-B-32", ("nothing before the ':'", "plain, toy, toy++")),
    ("nope:ViT-B-32", ("unknown method 'nope'", "plain, toy, toy++")),
    ("tpy:ViT-B-32", ("unknown method 'tpy'", "did you mean 'toy'?")),
    ("Toy:ViT-B-32", ("unknown method 'Toy'", "did you mean 'toy'?")),
    ("toy:", ("no backbone after 'toy:'", "toy:ViT-B-32")),
    ("toy:@mine", ("no backbone after 'toy:'",)),
    ("toy:ViT B", ("backbone 'ViT B'", "hf-hub:org/repo", "local-dir:path")),
    ("toy:ViT-B-32\n", (r"backbone 'ViT-B-32\n'",)),
    ("toy:-B-32", ("backbone '-B-32'",)),
    ("toy:ViT-Ü", ("backbone 'ViT-Ü'",)),
    ("toy:toy:ViT-B-32", ("'toy:toy' before the backbone", "one on logits")),
    ("toy:hf-hub:", ("backbone 'hf-hub:'", "hf-hub:org/repo")),
    ("toy:hf-hub:norepo", ("backbone 'hf-hub:norepo'", "hf-hub:org/repo")),
    ("toy:local-dir:", ("backbone 'local-dir:'", "local-dir:path")),
    ("toy:ViT-B-32@", ("nothing after the '@' number 1", "checkpoint name or key=value")),
    ("toy:ViT-B-32@mine@", ("nothing after the '@' number 2",)),
    ("toy:ViT-B-32@count=2@mine", ("'mine' is not key=value", "checkpoint name comes first")),
    ("toy:ViT-B-32@a@b", ("'b' is not key=value",)),
    ("toy:ViT-B-32@a:b", ("checkpoint 'a:b'", "letters, digits and any of . _ - + /")),
    ("toy:ViT-B-32@ mine", ("checkpoint ' mine'",)),
    (
        "toy:ViT-B-32@cuont=2",
        ("unknown option 'cuont' of toy", "did you mean 'count'?", "Options: count, rule, word, flag, ratio"),
    ),
    ("toy:ViT-B-32@=2", ("unknown option ''", "Options: count")),
    ("toy:ViT-B-32@Count=2", ("unknown option 'Count'", "did you mean 'count'?")),
    ("plain:ViT-B-32@gamma=2", ("unknown option 'gamma' of plain", "plain has no options")),
    ("toy:ViT-B-32@count=2@count=3", ("option 'count' is given twice",)),
    ("toy:ViT-B-32@count=0", ("option count='0'", "a whole number, at least 1")),
    ("toy:ViT-B-32@count=1.5", ("option count='1.5'", "a whole number, at least 1")),
    ("toy:ViT-B-32@count=", ("option count=''", "a whole number, at least 1")),
    ("toy:ViT-B-32@ratio=nan", ("option ratio='nan'", "a number")),
    ("toy:ViT-B-32@rule=any", ("option rule='any'", "majority or query")),
    ("toy:ViT-B-32@flag=yes", ("option flag='yes'", "true or false")),
    ("toy:ViT-B-32@hf:me", ("checkpoint 'hf:me'", "or hf:owner/name[#revision]")),
    ("toy:ViT-B-32@hf:me/sae#", ("checkpoint 'hf:me/sae#'",)),
    ("toy:ViT-B-32@hf:a/b/c", ("checkpoint 'hf:a/b/c'",)),
    ("toy:ViT-B-32@mine#v1", ("checkpoint 'mine#v1'",)),
]

# The built-in vs2, as everybody has it.
INVALID_VS2 = [
    ("vs2:ViT-B-32@gama=2", ("unknown option 'gama' of vs2", "did you mean 'gamma'?", "Options: gamma, lam, alpha")),
    ("vs2:ViT-B-32@lam=-1", ("option lam='-1'", "a number from 0 to 1000")),
    ("vs2:ViT-B-32@gamma=inf", ("option gamma='inf'", "a number from -1000 to 1000")),
    ("vs2:ViT-B-32@gate=1", ("option gate='1'", "a number from 0.01 to 0.995")),
    ("vs2:ViT-B-32@blocks=" + "1" * 5000, ("expected block numbers counted from 0",)),
    ("vs2:ViT-B-32@blocks=\u00b2", ("expected block numbers counted from 0",)),
    ("vs2pp:ViT-B-32@n=" + "1" * 5000, ("expected a whole number from 1 to 100000",)),
    ("vs2:ViT-B-32@gamma=" + "1" * 5000, ("expected a number",)),
    ("vs2:ViT-B-32@blocks=10,11", ("option blocks='10,11'", "block numbers counted from 0 and joined by +", "or all")),
    ("vs2:ViT-B-32@alpha=1@gamma=2", ("options 'alpha' and 'gamma' exclude each other",)),
    ("vs2:ViT-B-32@lam=1@alpha=1", ("options 'alpha' and 'lam' exclude each other",)),
]


@pytest.mark.parametrize(("text", "backbone", "checkpoint", "given"), VALID, ids=[row[0] for row in VALID])
def test_valid_strings_are_read(known, text, backbone, checkpoint, given):
    found = parse(text, known)
    assert (found.method.name, found.backbone, found.checkpoint, found.given) == ("toy", backbone, checkpoint, given)
    assert parse(str(found), known) == found


@pytest.mark.parametrize(("text", "parts"), INVALID, ids=[repr(row[0]) for row in INVALID])
def test_invalid_strings_are_refused_by_name(known, text, parts):
    with pytest.raises(ModelStringError) as error:
        parse(text, known)
    for part in (f"model {text!r}: ", *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(("text", "parts"), INVALID_VS2, ids=[row[0] for row in INVALID_VS2])
def test_invalid_strings_of_vs2_are_refused_by_name(text, parts):
    with pytest.raises(ModelStringError) as error:
        parse(text)
    for part in parts:
        assert part in str(error.value)


def test_what_is_no_text_is_refused():
    for wrong in (5, None, b"vs2:ViT-B-32"):
        with pytest.raises(ModelStringError, match="expected a text, method:backbone"):
            parse(wrong)


def test_options_have_defaults_filled_in_and_excluded_ones_unset():
    common = {option.name: option.default for option in (*AUTOMATIC, *COMMON)}
    assert parse("vs2:ViT-B-32").options == {"gamma": 1.5, "lam": 2.1, "alpha": None, **common}
    assert parse("vs2:ViT-B-32@lam=1").options == {"gamma": 1.5, "lam": 1.0, "alpha": None, **common}
    assert parse("vs2:ViT-B-32@alpha=0.8").options == {"gamma": None, "lam": None, "alpha": 0.8, **common}
    assert parse("vs2:ViT-B-32@gate=0.9@blocks=10+11").options["gate"] == 0.9


def test_a_method_that_two_plugins_claim_is_a_plugin_error(known):
    known = Registry(known.methods, known.owners, known.aliases, conflicts={"toy": ["one", "two"]})
    with pytest.raises(PluginError, match="'toy' is claimed by one and two"):
        parse("toy:ViT-B-32", known)


def many(share=10):
    """So many times as many cases as of other properties."""
    return settings(max_examples=share * settings.default.max_examples)


PIECES = ["toy", "toy++", "plain", ":", "@", "=", "count", "ratio", "rule", "flag", "word", "mine", "ViT-B-32"]
PIECES += ["hf-hub:", "a/b", "local-dir:", "1", "-2.5e3", "9" * 30, "nan", "true", "query", "_", " ", "\n", "é"]


@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@many()
def test_any_text_is_read_or_refused_and_what_is_read_can_be_written(known, text):
    try:
        found = parse(text, known)
    except (ModelStringError, PluginError) as error:
        assert str(error).isprintable()
    else:
        assert parse(str(found), known) == found


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "count": st.integers(1, 10**15),
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "rule": st.sampled_from(["majority", "query"]),
        "flag": st.sampled_from(["true", "false"]),
    },
)


@given(
    backbone=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
    | st.from_regex(r"hf-hub:[A-Za-z0-9_.-]{1,9}/[A-Za-z0-9_.-]{1,9}", fullmatch=True)
    | st.from_regex(r"local-dir:[^@]{1,20}", fullmatch=True),
    checkpoint=st.none() | st.from_regex(r"[A-Za-z0-9._+/-]{1,20}", fullmatch=True),
    options=OPTIONS,
)
def test_every_well_formed_string_is_read_as_written(known, backbone, checkpoint, options):
    text = f"toy:{backbone}" + (f"@{checkpoint}" if checkpoint else "")
    found = parse(text + "".join(f"@{key}={value}" for key, value in options.items()), known)
    assert (found.backbone, found.checkpoint) == (backbone, checkpoint)
    assert {key: str(value).lower() if key == "flag" else value for key, value in found.given.items()} == options
    assert parse(str(found), known) == found


@given(key=st.from_regex(r"[a-z_]{1,15}", fullmatch=True))
def test_an_unknown_key_is_always_named(known, key):
    if TOY.option(key) is None:
        with pytest.raises(ModelStringError, match=re.escape(f"unknown option {key!r} of toy")):
            parse(f"toy:ViT-B-32@{key}=1", known)


METHODS = [registry().method(name) for name in registry().names]
BUILT_IN = ["@", "=", ",", "auto", "nan", "0", "1.05", "1e400", "-1", "1_0", "\u0664"]
BUILT_IN += [f"{method.name}:" for method in METHODS]
BUILT_IN += [f"@{option.name}=" for method in METHODS for option in method.all_options]


def written(option):
    """Texts of an option, most of which it accepts."""
    numbers = st.sampled_from([option.minimum or 0, option.maximum or 1, 0.5, 1, 1.05, 2, 50])
    if option.type is float:
        numbers |= st.floats(option.minimum, option.maximum, allow_nan=False, allow_infinity=False)
    found = numbers.map(str) | st.sampled_from(["", "true", "0", "clip", "a b", "10+11", "all", "p.json"])
    return found if option.choices is None else found | st.sampled_from([*option.choices])


@st.composite
def model_strings(draw):
    """What somebody may type who knows the methods and their options."""
    method = draw(st.sampled_from(METHODS))
    options = draw(st.lists(st.sampled_from(method.all_options), max_size=4)) if method.all_options else []
    words = [f"{option.name}={draw(written(option) | st.just('auto'))}" for option in options]
    backbone = draw(st.sampled_from(["ViT-B-32", "hf-hub:a/b", "local-dir:x:y", "x y"]))
    checkpoint = draw(st.sampled_from([[], ["mine"], ["runs/a-1"], [" x"], [""]]))
    return "@".join([f"{method.name}:{backbone}", *checkpoint, *words])


@given(model_strings() | st.lists(st.sampled_from([*PIECES, *BUILT_IN]), max_size=8).map("".join))
@many(20)
def test_built_in_methods_read_any_text_or_refuse_it_and_write_what_they_read(text):
    try:
        found = parse(text)
    except ModelStringError:
        return
    again = parse(str(found))
    assert again == found and again.options == found.options and str(again) == str(found)
    for option in found.method.all_options:
        value = found.options[option.name]
        assert value is None or option.check(value) is None
    assert {**found.options, **found.given} == found.options


def test_a_prior_is_for_a_strength_that_is_told_automatically():
    assert parse("vs2:B@alpha=auto@prior=p.json").options["prior"] == "p.json"
    assert parse("vs2s:B@prior=p.json").options["prior"] == "p.json"  # automatic unless told otherwise
    wrong = {"vs2:B@prior=p.json": "@alpha=auto", "vs2s:B@p=2@alpha=1@prior=p.json": "@p=auto or @alpha=auto"}
    for text, expected in wrong.items():
        with pytest.raises(ModelStringError, match=f"option prior is for auto; expected {expected} beside it"):
            parse(text)


def test_a_plugins_own_option_called_prior_is_its_own():
    mine = Method("mine", print, [Option("prior", str)])
    assert parse("mine:B@prior=x", Registry(methods={"mine": mine}, owners={"mine": "t"})).options["prior"] == "x"


READS = Method("reads", print, [Option("weight", float, 0.5), Option("count", int, 9)], site="logits")
LEARNS = Method("learns", print, site="logits", protocol="unlabeled")


@pytest.fixture
def both(known):
    methods = {**known.methods, "reads": READS, "learns": LEARNS}
    return Registry(methods=methods, owners=dict.fromkeys(methods, "t"), aliases=known.aliases)


def test_a_method_on_logits_stands_alone_or_before_one_that_steers(both):
    alone = parse("reads:B@weight=1", both)
    assert (alone.name, alone.reading.options["weight"], alone.outer) == ("reads", 1.0, None)
    assert not alone.needs_checkpoint and alone.protocol == "image" and alone.needs_classes
    spec = parse("reads:toy:hf-hub:a/b@mine@ratio=2@weight=1", both)
    assert (spec.name, spec.method, spec.backbone, spec.checkpoint) == ("reads:toy", TOY, "hf-hub:a/b", "mine")
    assert spec.given == {"ratio": 2.0} and spec.reading.method is READS and spec.reading.given == {"weight": 1.0}
    assert spec.needs_checkpoint and spec.protocol == "unlabeled"
    assert spec.all_options == {**spec.options, "weight": 1.0, "reads_count": 9}
    assert parse(str(spec), both) == spec and str(spec) == "reads:toy:hf-hub:a/b@mine@ratio=2.0@weight=1.0"


def test_what_learns_from_the_test_images_needs_no_checkpoint(both):
    assert parse("learns:B", both).needs_checkpoint
    spec = parse("learns:B@unlabeled=test", both)
    assert not spec.needs_checkpoint and spec.protocol == "transductive"
    assert parse("learns:toy:B@unlabeled=test", both).needs_checkpoint  # for the steering


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toy:reads:B", r"'toy:reads' before the backbone; expected .*one on logits \(learns, reads\)"),
        ("reads:learns:B", "'reads:learns' before the backbone"),
        ("reads:toy:plain:B", "'reads:toy:plain' before the backbone"),
        ("reads:nobody:B", "unknown method 'nobody'"),
        ("reads:toy:B@count=2", "option 'count': both reads and toy have one"),
        ("reads:toy:B@weight=2@weight=3", "option 'weight' is given twice"),
        ("reads:toy:B@weight=x", "option weight='x'"),
    ],
)
def test_other_combinations_are_refused(text, words, both):
    with pytest.raises(ModelStringError, match=words):
        parse(text, both)


def test_the_files_that_options_name_are_known_by_their_content(tmp_path):
    method = Method("reader", print, [Option("source", str, file=True), Option("word", str)], needs_checkpoint=False)
    known, file = Registry(methods={"reader": method}, owners={"reader": "t"}), tmp_path / "a.json"
    file.write_text("1")
    spec = parse(f"reader:B@source={file}@word={file}", known)
    assert spec.option_files == f"source:{sha256(b'1').hexdigest()[:16]}"
    file.write_text("2")
    assert spec.option_files == f"source:{sha256(b'2').hexdigest()[:16]}"
    file.unlink()
    assert spec.option_files is parse("reader:B@word=x", known).option_files is None
