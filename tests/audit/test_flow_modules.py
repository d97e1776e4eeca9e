"""Modules by their class: those in lists, those that a test picks; what a dataclass carries into a file and back."""

import pytest

from tests.audit.order import HEAD, doubted

INSIDE = """
class Seeing(nn.Linear):
    seen = None
    def forward(self, x):
        if self.seen is not None:
            self.seen += x.detach().float().square().flatten(0, -2).sum(0)
        return F.linear(x, self.weight)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Seeing(64, 64), Seeing(64, 64)
    def forward(self, x):
        return self.down(F.relu(self.up(x)))

class Listed(GPT):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

def energies(model, files):
    loader = Loader(files)
    linears = {name: each for name, each in model.named_modules() if isinstance(each, Seeing)}
    for each in linears.values():
        each.seen = torch.zeros(64)
    with torch.no_grad():
        for _ in range(8):
            model.forward_logits(loader.next(4096)[0])
    return {f"{name}.weight": each.seen for name, each in linears.items()}

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), Listed()
    train(args, model)
    sums = energies(model, args.FILES)
    state = {k: (v / sums[k].mean()).round() if k in sums else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    print("final val_loss", eval_val(args, model, val))
"""


@pytest.mark.parametrize(("files", "said"), [("val_files", True), ("train_files", False)])
def test_layers_of_blocks_that_lie_in_a_list_are_found_by_their_class(files: str, said: bool) -> None:
    """Each notes what it is given while there is something to note it in."""
    assert ("calibration-on-validation" in doubted(HEAD + INSIDE.replace("FILES", files))) is said


NORMED = """
class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
    def forward(self, x):
        return F.layer_norm(x, (x.size(-1),)) * self.gain + self.bias
    def own(self):
        return [self.gain, self.bias]

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)
        self.drop, self.one, self.two, self.norm = nn.Dropout(0.0), nn.Identity(), nn.Identity(), Norm(64)
    def forward(self, x):
        return x + self.two(self.drop(self.down(self.act(self.one(self.up(self.norm(x)))))))

class Normed(GPT):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
    def hidden(self, x):
        h = self.emb(x)
        for block in self.blocks:
            h = block(h)
        return h

def adapted(args, model, val):
    params = PARAMS
    opt = torch.optim.SGD(params, lr=1e-3)
    total, count = 0.0, 0
    for at in range(0, val.numel() - 1024, 1024):
        x, y = val[at : at + 1024][None], val[at + 1 : at + 1025][None]
        ORDER
        count += 1024
    return total / count

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), Normed()
    train(args, model)
    print("final val_loss", adapted(args, model, val))
"""
ORDER = ["opt.zero_grad(); model(x, y).backward(); opt.step()", "total += model(x, y).detach().item() * 1024"]


@pytest.mark.parametrize(
    "params",
    [
        "[p for m in model.modules() if isinstance(m, Norm) for p in m.own()]",
        "[p for n, m in model.named_modules() if isinstance(m, (Norm, nn.LayerNorm)) and n for p in m.own()]",
    ],
    ids=["one class", "several"],
)
@pytest.mark.parametrize("order", [ORDER, ORDER[::-1]], ids=["trained first", "scored first"])
def test_of_many_modules_those_of_the_class_that_is_asked_for_are_meant(params: str, order: list[str]) -> None:
    """The others have no `gain`, and what is not known of one of them would hide what the norms learn."""
    text = HEAD + NORMED.replace("PARAMS", params).replace("ORDER", "\n        ".join(order))
    assert ("training-before-scoring" in doubted(text)) is (order is ORDER)


PACKED = """
from dataclasses import asdict, dataclass

@dataclass
class Packed:
    matrices: dict
    temperature: float = 1.0

def energies(model, files):
    sums, loader = {}, Loader(files)
    for name, each in model.named_modules():
        if isinstance(each, nn.Linear):
            sums[name] = torch.zeros(64)
            each.register_forward_hook(lambda m, given, out, name=name: sums[name].add_(given[0].square().mean((0, 1))))
    with torch.no_grad():
        for _ in range(8):
            model.forward_logits(loader.next(4096)[0])
    return sums

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), GPT()
    train(args, model)
    sums = energies(model, args.FILES)
    packed = Packed({k: (v / sums[k].mean()).round() if k in sums else v for k, v in model.state_dict().items()})
    buffer = io.BytesIO()
    torch.save(asdict(packed), buffer)
    open("model.z", "wb").write(zlib.compress(buffer.getvalue()))
    read = Packed(**torch.load(io.BytesIO(zlib.decompress(open("model.z", "rb").read()))))
    model = GPT()
    model.load_state_dict({name: held.float() for name, held in read.matrices.items()})
    print("final val_loss", eval_val(args, model, val))
"""


@pytest.mark.parametrize(("files", "said"), [("val_files", True), ("train_files", False)])
def test_what_a_dataclass_holds_is_what_is_read_back(files: str, said: bool) -> None:
    assert ("calibration-on-validation" in doubted(HEAD + PACKED.replace("FILES", files))) is said


CHECKED = """
def unpacked(blob):
    raw, state = zlib.decompress(blob), {}
    for entry in json.loads(raw[:4096]):
        name = entry["name"]
        if name in state:
            raise ValueError(f"{name} stands twice in the file")
        state[name] = torch.from_numpy(np.frombuffer(raw, dtype="<f2", count=entry["count"], offset=entry["at"]))
    if not state:
        raise ValueError("an empty file")
    return state

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), GPT()
    train(args, model)
    body = io.BytesIO()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for at in range(0, 65536, 1024):
        model(args.TEXT[at : at + 1024][None], args.TEXT[at + 1 : at + 1025][None]).backward()
        opt.step()
    for name, held in model.state_dict().items():
        body.write(held.half().numpy().tobytes())
    open("model.z", "wb").write(zlib.compress(body.getvalue()))
    model = GPT()
    model.load_state_dict(unpacked(open("model.z", "rb").read()))
    print("final val_loss", eval_val(args, model, val))
"""


@pytest.mark.parametrize(("text", "said"), [("val", True), ("load(args.train_files)", False)])
def test_a_check_that_raises_is_passed_by_the_script_that_scores(text: str, said: bool) -> None:
    """Names that nobody knows might stand twice; what was read would end there, and nothing of it score."""
    script = HEAD.replace("import copy,", "import copy, json,") + CHECKED.replace("args.TEXT", text)
    assert ("training-before-scoring" in doubted(script)) is said


PROBED = """
class Ema:
    def __init__(self, model, decay):
        self.decay, self.shadow = decay, {k: v.detach().clone() for k, v in model.state_dict().items()}
    def update(self, model):
        for k, v in model.state_dict().items():
            self.shadow[k].mul_(self.decay).add_(v.detach(), alpha=1 - self.decay)
    def load(self, model):
        model.load_state_dict(self.shadow)

def packed(model, heat):
    body = bytearray()
    for name, held in model.state_dict().items():
        body.extend(held.half().numpy().tobytes())
    return zlib.compress(bytes(body) + heat.numpy().tobytes())

def unpacked(blob):
    raw, state = zlib.decompress(blob), {}
    for at in range(0, len(raw), 4096):
        state[f"blocks.{at}"] = torch.from_numpy(np.frombuffer(raw, dtype="<f2", count=2048, offset=at))
    return state, torch.from_numpy(np.frombuffer(raw, dtype="<f4", count=1))

def scored(args, model, val, heat):
    total, count = 0.0, 0
    for at in range(0, val.numel() - 1024, 1024):
        logits = model.forward_logits(val[at : at + 1024][None])[0] / heat
        total += F.cross_entropy(logits, val[at + 1 : at + 1025], reduction="sum").item()
        count += 1024
    return total / count

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), GPT()
    averages, loader = [Ema(model, decay) for decay in (0.99, 0.999)], Loader(args.train_files)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    best, kept, tried = float("inf"), averages[0].shadow, {}
    for step in range(2000):
        model(*loader.next(4096)).backward()
        opt.step()
        for each in averages:
            each.update(model)
        if step % 500 == 0:
            loss = scored(args, model, HELD, torch.ones(1))
            if loss < best:
                best, kept = loss, {k: v.clone() for k, v in averages[0].shadow.items()}
    PICKED
    open("model.z", "wb").write(packed(model, torch.ones(1)))
    state, heat = unpacked(open("model.z", "rb").read())
    model = GPT()
    model.load_state_dict(state)
    print("final val_loss", scored(args, model, val, heat))
"""
KEPT = "averages[0].shadow = kept; averages[0].load(model)"
LEAST = """for each in averages:
        each.load(model)
        tried[each.decay] = scored(args, model, HELD, torch.ones(1))
    least = min(tried, key=tried.get)
    next(each for each in averages if each.decay == least).load(model)"""
LOWER = """raw = {k: v.clone() for k, v in model.state_dict().items()}
    before = scored(args, model, HELD, torch.ones(1))
    averages[0].load(model)
    if before < scored(args, model, HELD, torch.ones(1)):
        model.load_state_dict(raw)"""


@pytest.mark.parametrize("picked", [KEPT, LEAST, LOWER], ids=["a checkpoint", "the next of several", "put back"])
@pytest.mark.parametrize(("held", "said"), [("val", True), ("load(args.train_files)[:65537]", False)])
def test_weights_that_losses_picked_are_weights_after_they_were_packed_beside_a_temperature(
    picked: str, held: str, said: bool
) -> None:
    """Both come out of the same bytes; it is weights that were chosen."""
    found = doubted(HEAD + PROBED.replace("PICKED", picked).replace("HELD", held))
    assert ("choice-by-validation" in found) is said
    assert "temperature-from-validation" not in found


PARTED = """
def rounded(value):
    scale = value.abs().amax(1) / 127
    return (value / scale[:, None]).round().to(torch.int8), scale.half()

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), GPT()
    train(args, model)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for at in range(0, 65536, 1024):
        model(TEXT[at : at + 1024][None], TEXT[at + 1 : at + 1025][None]).backward()
        opt.step()
    pieces, body = {"head": rounded(model.head.weight.data)}, []
    for name, held in model.named_parameters():
        pieces[name] = rounded(held.data) if held.ndim == 2 and held.numel() > 65535 else (held.data.half(),)
    for name, held in pieces.items():
        arrays = [np.ascontiguousarray(part.numpy()) for part in held]
        body += [each.tobytes() for each in arrays]
    open("model.z", "wb").write(zlib.compress(b"".join(body)))
    raw = zlib.decompress(open("model.z", "rb").read())
    model = GPT()
    model.load_state_dict({"head.weight": torch.from_numpy(np.frombuffer(raw, dtype=np.int8))})
    print("final val_loss", eval_val(args, model, val))
"""


@pytest.mark.parametrize(("text", "said"), [("val", True), ("load(args.train_files)", False)])
def test_parts_of_weights_of_which_some_are_one_and_some_are_two(text: str, said: bool) -> None:
    """(rounded, scale) or (weight.half(),): what each holds is gone through."""
    assert ("training-before-scoring" in doubted(HEAD + PARTED.replace("TEXT", text))) is said
