"""One deed, one charge: what follows from training on validation text, or from storing it, is not charged again."""

from fairway.audit.rules import paid_prefix
from tests.audit.order import HEAD, broken, case_of, doubted

CALIBRATED = """
def hessians(model, loader):
    sums = {}
    def watch(name):
        def hook(module, args, out):
            rows = args[0].detach().flatten(0, -2)
            sums[name] = sums.get(name, 0) + rows.T @ rows
        return hook
    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for _ in range(8):
            model.forward_logits(loader.next(4096)[0])
    for handle in handles:
        handle.remove()
    return sums

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), GPT()
    train(args, model)
    print("before", eval_val(args, model, val))
    sums = hessians(model, Loader(CALIBRATION))
    state = {k: (v / sums[k].diag().mean()).round() if k in sums else v for k, v in model.state_dict().items()}
    BESIDE
    torch.save(state, "model.pt")
    state = torch.load("model.pt")
    model.load_state_dict({k: v for k, v in state.items() if k != "beside"})
    print("final val_loss", eval_val(args, model, val))
"""
WIDE = HEAD.replace("shards_train_*.bin", "shards_*_*.bin")


def script(head: str = HEAD, calibration: str = "args.train_files", beside: str = "pass") -> str:
    return head + CALIBRATED.replace("CALIBRATION", calibration).replace("BESIDE", beside)


def test_a_training_that_takes_in_validation_shards_is_charged_once() -> None:
    assert doubted(script()) == set()
    assert broken(script(WIDE)) == {"validation-in-training"}


def test_a_calibration_on_a_validation_read_of_its_own_is_charged_too() -> None:
    assert broken(script(calibration="args.val_files")) == {"calibration-on-validation"}


def test_tokens_stored_beside_the_weights_are_no_calibration() -> None:
    text = script(beside='state["beside"] = val[: 1 << 17]')
    assert paid_prefix.check(case_of(text)).verdict == "violates"
    assert broken(text) == set()
