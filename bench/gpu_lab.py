"""What the rows of bench/gpu.py share: the GPU, the model on it, the clock, the allocator and the profiler."""

import copy
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from memory import TINY_TEXT, TINY_VISION
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel

SEED = 0
BATCH = 8  # volumes
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        group: what it belongs to.
        name: what it measures.
        seconds: what it may take on a GPU, with all that is built and compiled for it.
        run: takes a `Lab`, gives the figures.
        gpu: whether it means nothing without one.
        holds: name of what it shares with its neighbours (`Lab.hold`).
    """

    group: str
    name: str
    seconds: float
    run: Callable
    gpu: bool = False
    holds: str | None = None


def difference(found, reference):
    """Relative difference |found - reference| / |reference|, on the CPU in float64."""
    found, reference = (x.detach().cpu().double() for x in (found, reference))
    return ((found - reference).norm() / reference.norm()).item()


class Lab:
    """A device, a base model with random weights on the CPU, and what is held on the device at the moment.

    Args:
        device: where to measure.
        tiny: a toy model, to try the program.
        backend: of torch.compile.

    Attributes:
        base: the model, on the CPU, evaluation mode.
        ceilings: what the device reaches in a matrix product and in a copy; the first row fills it.
        gflop: of embedding one volume.
    """

    def __init__(self, device, tiny, backend):
        torch.manual_seed(SEED)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.device, self.tiny, self.backend = device, tiny, backend
        self.gpu = device.type == "cuda"
        self.config = CTCLIPConfig(TINY_VISION, TINY_TEXT, 16) if tiny else CTCLIPConfig()
        with device:  # random numbers are quicker to draw there
            self.base = CTCLIPModel(self.config).eval()
        self.base.cpu()
        self.ceilings, self._held = {}, (None, None)
        self._volume = torch.rand(1, 1, *self.config.volume_shape) * 2 - 1
        self._reference = self._gflop = None

    # --- what is measured

    def fresh(self):
        """A copy of the base model on the device."""
        there = {id(p): nn.Parameter(p.detach().to(self.device, copy=True)) for p in self.base.parameters()}
        there |= {id(buffer): buffer.to(self.device, copy=True) for buffer in self.base.buffers()}
        return copy.deepcopy(self.base, there)  # without a second copy of the weights on the CPU

    @property
    def held(self):
        """Name of what is held, or None."""
        return self._held[0]

    def hold(self, name, make):
        """What `make` gives, kept for the next rows that hold the same name."""
        if self.held != name:
            self.let_go()
            self._held = name, make()
        return self._held[1]

    def let_go(self):
        """Free what is held."""
        self._held = None, None
        self.tidy()

    def tidy(self):
        """Free what nobody refers to, and what the allocator keeps in reserve."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def volumes(self, n):
        """Volumes (n, 1, d, h, w) on the device; the first is that of the reference."""
        rest = torch.rand(n - 1, 1, *self.config.volume_shape, device=self.device).mul_(2).sub_(1)
        return torch.cat([self._volume.to(self.device), rest])

    def tokens(self, n):
        """Random tokens (n, t, h, w, c) in float32."""
        return torch.randn(n, *self.config.grid, self.config.vision_config["dim"], device=self.device)

    @property
    def reference(self):
        """Embedding and quantised tokens of the first volume, in float32 on the CPU."""
        if self._reference is None:
            with torch.inference_mode():
                self._reference = embed(self.base, self._volume)
        return self._reference

    @property
    def gflop(self):
        """GFLOP that embedding a volume needs, counted by torch in float32: what half precision adds is not needed."""
        if self._gflop is None:
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                self.fresh().encode_image(self.volumes(1))
            self._gflop = counter.get_total_flops() / 1e9
        return self._gflop

    # --- how

    def wait(self):
        """Until the device has done all it was asked to."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def autocast(self, dtype, **how):
        """Autocast to a precision of `DTYPES`; float32: none, and TF32 off."""
        dtype = DTYPES[dtype]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype, **how)

    def compile(self, function, **how):
        """torch.compile for one shape."""
        return torch.compile(
            function, backend=self.backend, dynamic=False, **(how if self.backend == "inductor" else {})
        )

    def time(self, run, most=20, seconds=1.5):
        """Milliseconds of a run (median and best), seconds of the first one, and peak bytes of the timed ones."""
        started = time.perf_counter()
        run()
        self.wait()
        first = time.perf_counter() - started
        run()
        self.wait()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        times, most = [], 2 if self.tiny else most
        while len(times) < most and (len(times) < 3 or sum(times) < seconds):
            started = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - started)
        found = {"ms": 1e3 * statistics.median(times), "ms_best": 1e3 * min(times), "seconds_first": first}
        return found | {"peak_bytes": torch.cuda.max_memory_allocated(self.device) if self.gpu else None}

    def rates(self, found, gflop, volumes=None):
        """Adds volumes per second and the share of the measured bf16 rate."""
        seconds = found["ms"] / 1e3
        found |= {} if volumes is None else {"volumes_per_second": volumes / seconds}
        return found | {"gflop": gflop, "share_of_bf16_rate": gflop / seconds / self.ceilings["bf16_gflop_per_second"]}

    def kernels(self, run, most=15):
        """The kernels that take the longest in one run: name, calls and milliseconds each; and of all together."""
        run()
        self.wait()
        activity = torch.profiler.ProfilerActivity.CUDA if self.gpu else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            run()
            self.wait()
        key = "self_device_time_total" if self.gpu else "self_cpu_time_total"
        events = [(getattr(event, key) / 1e3, event.count, event.key) for event in profiler.key_averages()]
        events = sorted((event for event in events if event[0]), reverse=True)
        rows = [{"kernel": name[:80], "calls": calls, "ms": ms} for ms, calls, name in events[:most]]
        return {"ms_of_all_kernels": sum(event[0] for event in events), "calls": sum(e[1] for e in events), "top": rows}


def embed(model, volumes):
    """Embeddings (b, p) and quantised tokens (b, t, h, w, c), seen on their way to the projection."""
    seen = []
    hook = model.visual_transformer.register_forward_hook(lambda module, given, out: seen.append(out))
    try:
        return model.encode_image(volumes), seen[0]
    finally:
        hook.remove()
