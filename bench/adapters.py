"""Measure one base model with 1, 20 and 100 adapters on board against as many full models.

`make bench` runs it. Bytes on disk and in memory, milliseconds to load and to switch, at both sizes; of the mini model
also a mixed batch against one volume after the other. All adapters are copies of one: what they say is of no account
here. Each size has a process of its own; times are the processor's, the least of several, in turns. Writes
bench/adapters.json and the tables of docs/deploy.md.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import psutil
import torch
import transformers
from printing import made_with, publish

HERE = Path(__file__).resolve().parent
ABOARD, MIXED, VOLUMES, REPEATS = (1, 20, 100), 4, 8, 5
MB = 1e6


def resident():
    """Bytes that this process has in memory now."""
    return psutil.Process().memory_info().rss


def milliseconds(calls, repeats):
    """The least milliseconds of each call, in turns: whatever else the machine does meets all of them."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.process_time()
            call()
            found[name] = min(found[name], 1e3 * (time.process_time() - started))
    return found


def bytes_in(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def tensor_bytes(model):
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


def measure(size, folder, aboard, repeats):
    """Bytes and milliseconds of one size: "mini" or "full"."""
    from medctkit.deploy.bank import AdapterBank
    from medctkit.lora import adapter
    from medctkit.model.base_model import BaseModel, load_mini_base
    from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    mini = load_mini_base()
    own = load_mini_base().model if size == "mini" else CTCLIPModel(CTCLIPConfig()).eval()
    base = BaseModel(own, mini.tokenizer)
    model = {"bytes_in_memory": tensor_bytes(base.model)}
    base.model.save_pretrained(folder / "model")
    model["bytes_on_disk"] = bytes_in(folder / "model")
    adapted = adapter.add_lora(base.model, "paper", init_lora_weights=False)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    adapter.save_adapter(adapted, folder / "adapter")
    base = BaseModel(adapted.unload(), base.tokenizer)
    small = {"numbers": trainable, "bytes_on_disk": bytes_in(folder / "adapter")}
    before, digest, rows = resident(), adapter._digest(base.model), {}
    # which base model it is is asked once, not for each of a hundred copies
    with mock.patch.object(adapter, "_digest", lambda _: digest):
        started = time.process_time()
        bank = AdapterBank(base, {"h0": folder / "adapter"})
        for count in aboard:
            for i in range(len(bank.names), count):
                adapter.load_adapter(bank.model, folder / "adapter", f"h{i}")
            bank.names = tuple(f"h{i}" for i in range(count))
            row = {"bytes_in_memory": tensor_bytes(bank.model), "resident_more": resident() - before}
            row["seconds_to_load_since_the_last_row"] = time.process_time() - started
            rows[str(count)] = row | {"ms": scoring(bank, mini, size, repeats)}
            started = time.process_time()
    small["bytes_in_memory"] = (rows[str(aboard[-1])]["bytes_in_memory"] - model["bytes_in_memory"]) / aboard[-1]
    del bank, base, adapted, own
    model["ms_to_load"] = milliseconds({"load": lambda: CTCLIPModel.from_pretrained(folder / "model")}, 2)["load"]
    return {"model": model, "adapter": small, "aboard": rows}


def scoring(bank, plain, size, repeats):
    """Milliseconds to switch; of the mini model also for some volumes: of one adapter, mixed, one after the other."""
    calls = {"switch": lambda: bank.model.set_adapter("h0")}
    if size == "mini":  # at full size they are a minute each, and what an adapter adds to that is not seen
        from medctkit.zero_shot.classifier import ZeroShotClassifier

        shape, names = (
            plain.preprocess_config.shape,
            [bank.names[i % min(len(bank.names), MIXED)] for i in range(VOLUMES)],
        )
        volumes = torch.randn(VOLUMES, 1, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        alone = ZeroShotClassifier(plain.model, plain.tokenizer)
        calls |= {
            "base_alone": lambda: alone.scores(volumes),
            "one_adapter": lambda: bank.scores(volumes, names[:1] * VOLUMES),
            "mixed": lambda: bank.scores(volumes, names),
            "one_by_one": lambda: [bank.scores(v[None], [name]) for v, name in zip(volumes, names, strict=True)],
        }
    return milliseconds(calls, repeats)


def page(found):
    """The tables of docs/deploy.md."""
    lines = [
        "| on board | disk: base and adapters | as many models | memory: base and adapters | as many models | switch | "
        "load another model |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in ("full", "mini"):
        model, adapter = found[size]["model"], found[size]["adapter"]
        for count, row in found[size]["aboard"].items():
            n, mb = int(count), (lambda x: f"{x / MB:,.3g} MB" if x < 1e9 else f"{x / 1e9:,.3g} GB")
            disk, memory = (model[k] + n * adapter[k] for k in ("bytes_on_disk", "bytes_in_memory"))
            cells = [f"{size}, {n}", mb(disk), mb(n * model["bytes_on_disk"]), mb(memory)]
            cells += [
                mb(n * model["bytes_in_memory"]),
                f"{row['ms']['switch']:,.0f} ms",
                f"{model['ms_to_load']:,.0f} ms",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| mini, on board | {VOLUMES} volumes of one adapter | of {MIXED}, mixed | of {MIXED}, one by one |"]
    lines.append("|---|---|---|---|")
    for count, row in found["mini"]["aboard"].items():
        times = [row["ms"][name] / row["ms"]["base_alone"] for name in ("one_adapter", "mixed", "one_by_one")]
        lines.append(f"| {count} | {' | '.join(f'{ratio:.2f}' for ratio in times)} |")
    versions, full = found["made_with"]["versions"], found["full"]
    most = max(full["aboard"], key=int)
    last, adapter = full["aboard"][most], full["adapter"]
    more = last["resident_more"] / (last["bytes_in_memory"] - full["model"]["bytes_in_memory"])
    return [
        *lines,
        "",
        f"*Time of the processor, {found['made_with']['device']}, torch {versions['torch']}, peft {versions['peft']}; "
        f"in the second table as a multiple of the base model alone. At full size an adapter is {adapter['numbers']:,} "
        f"numbers, {adapter['bytes_on_disk'] / MB:.1f} MB; with {most} on board the process grows by {more:.2f} times "
        "their tensors.*",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the mini model for both sizes, to try the program")
    parser.add_argument("--output", type=Path, help="where to write; by default here and in docs/deploy.md")
    parser.add_argument("--size", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    aboard, repeats = ((1, 2), 1) if arguments.tiny else (ABOARD, REPEATS)
    if arguments.size:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.size, Path(folder), aboard, repeats)))
        return
    print("two sizes with up to 100 adapters: about 5 minutes, 3 GB of memory and 1.2 GB of disk", flush=True)
    found = {}
    for size in ("mini",) if arguments.tiny else ("mini", "full"):
        command = [sys.executable, __file__, "--size", size, *(["--tiny"] if arguments.tiny else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[size] = json.loads(done.stdout.splitlines()[-1])
    found.setdefault("full", found["mini"])
    device = f"{platform.machine()}, one thread"
    found["made_with"] = made_with("make bench", "medctkit torch peft transformers", device=device)
    publish("adapters", found, "deploy.md", page(found), arguments.output)


if __name__ == "__main__":
    main()
