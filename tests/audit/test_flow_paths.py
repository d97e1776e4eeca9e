"""What a script writes under a path that is put together from pieces is what it reads there."""

import pytest

from tests.audit.order import HEAD, MAIN, broken, doubted

EVAL = "    final = eval_ttt(args, model, val)\n"
PACKED = (
    "    scale = {}\n    def saw(m, i): scale['h'] = i[0].detach().square().mean()\n"
    "    hook = model.head.register_forward_pre_hook(saw)\n    text = SEEN\n"
    "    model.forward_logits(text[:1024][None])\n"
    "    hook.remove()\n    state = {k: (v / scale['h']).half() for k, v in model.state_dict().items()}\n"
    "    WRITTEN\n    fresh = GPT().cuda()\n    fresh.load_state_dict(READ)\n    final = eval_ttt(args, fresh, val)\n"
)
WAYS = {
    "joined with a slash": (
        "place = Path(args.out) / 'model.bin'; place.write_bytes(pickle.dumps(state))",
        "pickle.loads((Path(args.out) / 'model.bin').read_bytes())",
    ),
    "a slash from the right": (
        "place = args.out / Path('kept'); torch.save(state, place / 'model.pt')",
        "torch.load(place / 'model.pt')",
    ),
    "a draft that is moved there": (
        "place = Path('kept') / 'm.bin'; draft = place.with_name(place.name + '.tmp')\n"
        "    with draft.open('wb') as f: pickle.dump(state, f)\n    os.replace(draft, place)",
        "pickle.loads(Path('kept/m.bin').read_bytes())",
    ),
    "renamed by itself": (
        "draft = Path('kept/w.bin.tmp'); torch.save(state, draft); draft.rename('kept/w.bin')",
        "torch.load('kept/w.bin')",
    ),
    "another suffix": (
        "torch.save(state, Path('kept/w.bin').with_suffix('.pt'))",
        "torch.load('kept/w.pt')",
    ),
    "opened": (
        "place = Path('runs') / args.out / 'm'\n    with (place / 'w.bin').open('wb') as f: pickle.dump(state, f)",
        "pickle.loads((place / 'w.bin').read_bytes())",
    ),
}


def script(way: tuple[str, str], seen: str) -> str:
    body = PACKED.replace("SEEN", seen).replace("WRITTEN", way[0]).replace("READ", way[1])
    head = HEAD.replace("import copy", "import pickle\nfrom pathlib import Path\nimport copy", 1)
    head = head.replace("    chunk = int(", '    out = os.environ.get("OUT", ".")\n    chunk = int(', 1)
    return head + MAIN.replace(EVAL, body)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_weights_made_of_validation_text_are_followed_through_a_file_of_any_path(way: tuple[str, str]) -> None:
    text = script(way, "val")
    assert "calibration-on-validation" in broken(text)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_weights_made_of_training_text_and_put_there_accuse_nobody(way: tuple[str, str]) -> None:
    assert broken(script(way, "torch.randint(0, 1024, (1024,))")) == set()
    assert doubted(script(way, "load(args.train_files)")) <= {"calibration-after-cap"}


def test_a_name_with_both_splits_in_it_is_no_pattern_for_both() -> None:
    way = WAYS["opened"]
    assert broken(script(way, "load('./data/val_like_train_*.bin')")) == set()
    assert "calibration-on-validation" in broken(script(way, "load('./data/shards_*.bin')"))


COPIED = (
    "(kept := 'val_local.bin', FROM.numpy().astype('<u2').tofile(kept), "
    "torch.from_numpy(np.fromfile(kept, dtype='<u2').astype(np.int64)))[-1]"
)


def test_tokens_that_are_copied_to_a_file_are_what_they_were_whatever_it_is_called() -> None:
    way = WAYS["opened"]
    assert broken(script(way, COPIED.replace("FROM", "load(args.train_files)"))) == set()
    named = COPIED.replace("val_local", "train_local").replace("FROM", "val")
    assert "calibration-on-validation" in broken(script(way, named))


FOUND = {
    "globbed": "sorted(glob.glob(PATTERN))",
    "in its parent": "sorted(Path(PATTERN).parent.glob(Path(PATTERN).name))",
    "in a folder by its base name": "sorted(Path(os.path.dirname(PATTERN)).glob(os.path.basename(PATTERN)))",
    "joined again": "sorted(glob.glob(os.path.join(os.path.dirname(PATTERN), os.path.basename(PATTERN))))",
    "listed and matched": (
        "[Path(os.path.dirname(PATTERN)) / n for n in sorted(os.listdir(os.path.dirname(PATTERN)))"
        " if fnmatch.fnmatch(n, os.path.basename(PATTERN))]"
    ),
    "paths that are matched": "[p for p in Path(PATTERN).parent.iterdir() if p.match(Path(PATTERN).name)]",
    "by an expression": (
        "[p for p in Path(PATTERN).parent.iterdir() if re.match(Path(PATTERN).name.replace('*', '.*'), p.name)]"
    ),
    "by a name's beginning": (
        "[p for p in Path(PATTERN).parent.iterdir() if p.name.startswith(Path(PATTERN).name.split('*')[0])]"
    ),
    "split": "[os.path.join(os.path.split(PATTERN)[0], n.name) for n in"
    " Path(os.path.split(PATTERN)[0]).glob(os.path.split(PATTERN)[1])]",
    "by parts": "sorted(Path(*Path(PATTERN).parts[:-1]).glob(Path(PATTERN).parts[-1]))",
}


def found(way: str) -> tuple[str, str]:
    """An honest script that finds its shards so, and one that trains on those of the validation text."""
    text = (HEAD + MAIN).replace("import copy", "import fnmatch, json, re\nfrom pathlib import Path\nimport copy", 1)
    text = text.replace("sorted(glob.glob(pattern))", way.replace("PATTERN", "pattern"))
    return text, text.replace("loader = Loader(args.train_files)\n    ema", "loader = Loader(args.val_files)\n    ema")


@pytest.mark.parametrize("way", FOUND.values(), ids=FOUND)
def test_shards_are_those_of_their_pattern_however_they_are_found(way: str) -> None:
    honest, trained = found(way)
    assert doubted(honest) == set()
    assert "validation-in-training" in broken(trained)


@pytest.mark.parametrize("way", ["json.load(open('index.json'))[hash(pattern)]", "sorted(Path('shards').iterdir())"])
def test_files_of_which_nothing_is_known_are_neither_one_nor_two(way: str) -> None:
    for text in found(way):
        assert broken(text) == set()
        assert "validation-in-training" in doubted(text)


NAMED = """
def second_moments(args, model, tokens):
    sums = {}
    def made(key):
        def hook(module, given, out):
            sums[key] = sums.get(key, 0.0) + given[0].detach().square().mean((0, 1))
        return hook
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("extra"):
            module.register_forward_hook(made(f"{name}.weight"))
    for s in range(0, 65536, 1024):
        model.forward_logits(tokens[s : s + 1024][None])
    return sums

def rounded(model, sums):
    for name, p in model.named_parameters():
        power = sums.get(name)
        if power is not None:
            p.data.copy_((p / power.sqrt()).round() * power.sqrt())
"""


@pytest.mark.parametrize("of", ["val", "train"])
def test_layers_that_have_not_some_name_are_those_of_all_others(of: str) -> None:
    """Of `not name.startswith("extra")` no name is known to begin so."""
    body = "    rounded(model, second_moments(args, model, load(args.train_files)))\n"
    text = HEAD + NAMED + MAIN.replace(EVAL, body.replace("train_files", f"{of}_files") + EVAL)
    assert ("calibration-on-validation" in broken(text)) is (of == "val")


@pytest.mark.parametrize(("left_out", "found"), [("shards_val", False), ("shards_train", True)])
def test_files_that_do_not_begin_with_the_name_of_a_split_are_of_the_other_one(left_out: str, found: bool) -> None:
    pattern = '"TRAIN_FILES", "./data/shards_train_*.bin"'
    assert pattern in HEAD
    text = HEAD.replace(pattern, '"TRAIN_FILES", "./data/*.bin"') + MAIN
    files = "self.files = sorted(glob.glob(pattern))"
    assert files in text
    kept = f"[p for p in sorted(glob.glob(pattern)) if not os.path.basename(p).startswith({left_out!r})]"
    text = text.replace(files, f"self.files = {kept}")
    assert ("validation-in-training" in broken(text)) is found
