"""The training loop: one `Trainer` a process, from data to checkpoints.

`router_aux` in the logs is coef · (mean over layers of balance − 1): 0 when experts are used equally. Where biases
balance the experts, coef is there what `auto` would be without them, so that it still tells.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_engine.generate import generate
from moe_engine.model import Transformer
from moe_engine.train import memory, parallel
from moe_engine.train.checkpoint import Checkpoints
from moe_engine.train.config import TrainConfig, auto_aux_coef
from moe_engine.train.data import TokenDataset, TrainLoader, ValLoader
from moe_engine.train.device import DTYPES, memory_total, memory_used, peak_flops, pick_dtype
from moe_engine.train.errors import InputError
from moe_engine.train.metrics import RunLog
from moe_engine.train.parallel import World, all_sum, any_rank
from moe_engine.train.plots import draw_plots
from moe_engine.train.signals import StopSignals
from moe_engine.train.signs import WarningSigns, format_train_line
from moe_engine.train.step import Engine, Step, build_model
from moe_engine.train.tokenizer import check_spec, load_tokenizer

MAX_BAD_STEPS = 10  # iterations in a row without a finite gradient before a run gives up


class Trainer:
    """One process of a training run.

    Args:
        config: what to train.
        world: this process among the others.
        device: where.
    Raises:
        InputError: data, model, memory or an existing run do not fit the configuration.
    """

    def __init__(self, config: TrainConfig, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        parallel.check_sharding(world, device, config.dp_replicate, config.cpu_offload)
        self.dtype, self.dtype_note = pick_dtype(config.dtype, device)
        self.param_dtype = DTYPES[config.param_dtype]
        if self.param_dtype not in (torch.float32, self.dtype):
            raise InputError(
                f"--param_dtype {config.param_dtype}: expected --dtype {config.param_dtype}, got none, which on "
                f"--device {device.type} is {str(self.dtype).removeprefix('torch.')}"
            )
        self.train_data = TokenDataset.open(config.data_dir, "train", config.block_size)
        val_data = TokenDataset.open(config.data_dir, "val", config.block_size)
        meta = self.train_data.meta
        check_spec(meta.tokenizer)
        self.tokenizer = load_tokenizer(meta.tokenizer) if config.sample_every else None  # training needs no ranks
        self.model_config = config.model_config(meta.vocab_size)
        self._check_memory()

        placement = {"rank": world.rank, "world_size": world.size, "device": device}
        self.loader = TrainLoader(self.train_data, config.batch_size, seed=config.seed, **placement)
        self.val_loader = ValLoader(val_data, config.batch_size, config.eval_iters, **placement)
        self.notes = [*self.train_data.notes, *val_data.notes, *self._memory_note()]
        self.model = self._build_model()
        self.engine = Engine(config, self.model, world, device, self.dtype)
        self.checkpoints = Checkpoints(Path(config.out_dir), world, config.keep_last_n)

        self.iteration = 0
        self.val_loss = self.best_val_loss = math.inf
        self.bad_steps = 0
        self.signals = StopSignals()
        self.seconds: dict[str, float] = defaultdict(float)  # since the last log line, by what they went to
        self.signs = WarningSigns()

    # Building

    def _check_memory(self) -> None:
        """Refuse what cannot fit: weights, gradients and optimizer, without activations."""
        config, on_host = self.config, self.config.cpu_offload or self.device.type == "cpu"
        total = self.model_config.matrix_parameters()[0] + self.model_config.vocab_size * self.model_config.d_model
        need = memory.lasting_need(config, total, self.world.size, self.world.on_this_host if on_host else 1)
        have = memory_total(torch.device("cpu") if on_host else self.device)
        if need > have:
            where, this = ("on this host", "it") if on_host else ("per device", "this one")
            raise InputError(
                f"--preset {config.preset}: weights, gradients and optimizer of {total / 1e9:.2f} B parameters take "
                f"{need / 1e9:.0f} GB {where}, {this} has {have / 1e9:.0f} GB; "
                "take a smaller preset (--preset tiny trains anywhere) or more devices"
            )

    def _memory_note(self) -> list[str]:
        """The estimated peak beside the GPU's memory. A CPU's is not limited so; `moe-doctor --memory` estimates it."""
        if self.device.type != "cuda" or not self.world.is_main:
            return []
        run = memory.Run(self.config, self.model_config, self.world.size, self.dtype, on_gpu=True)
        try:
            return [memory.against(run, memory_total(self.device))]
        except Exception as error:  # advice, and on parts of PyTorch that may change: no reason not to train
            return [f"memory: not estimated ({type(error).__name__}: {str(error).partition(chr(10))[0]})"]

    def _build_model(self) -> Transformer:
        """Build on meta, shard, give storage once, initialise once, check."""
        config, param_dtype = self.config, self.param_dtype
        sharded = parallel.start(self.world, self.device, self.dtype, config.cpu_offload, param_dtype)
        model = build_model(config, self.model_config, self.world, self.device, self.dtype, sharded=sharded)
        model.to_empty(device="cpu" if config.cpu_offload else self.device)
        for router in (block.moe.router for block in model.blocks):
            if router.select_bias is not None:  # FSDP2 brings what it offloads to the device, but only parameters
                router.select_bias = router.select_bias.to(self.device)
        model.init_weights(self.config.seed)
        parallel.check_initialisation(model)
        return model

    @property
    def stop_signal(self) -> int | None:
        """What this process was asked to stop by."""
        return self.signals.number

    @property
    def tokens_per_iteration(self) -> int:
        """Over all ranks."""
        c = self.config
        return c.batch_size * c.block_size * c.grad_accum_steps * self.world.size

    # One iteration

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.config.grad_accum_steps):
            batch = self.loader.next_batch()
            self.seconds["data_wait"] += self.loader.wait_seconds
            yield batch

    def train_step(self) -> Step:
        """The next iteration."""
        step = self.engine.step(self._batches(), self.iteration)
        self.iteration += 1
        return step

    # Beside the steps

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin

    @torch.no_grad()
    def evaluate(self) -> float:
        """Validation loss in nats per token, over the same windows every time and whatever the number of ranks."""
        with self._timed("eval"):
            sums = torch.zeros(2, dtype=torch.float64, device=self.device)
            counts: Tensor | int = 0
            for inputs, targets in self.val_loader:
                out = self.model(inputs, targets)
                sums += torch.stack((out.loss.double(), (targets >= 0).sum().double()))
                counts = counts + out.stats.expert_counts
            total, count = all_sum(sums, self.world).tolist()
            counts = all_sum(counts, self.world).double()
        self.val_loss = total / count
        share = {"expert_share": counts / counts.sum(-1, keepdim=True)} if self.config.log_router_stats else {}
        self.log.metrics("eval", self.iteration, loss=self.val_loss, **share)
        best = " (best)" if self.val_loss < self.best_val_loss else ""
        self.log.note(f"iter {self.iteration}/{self.config.max_iters} | val loss {self.val_loss:.4f}{best}")
        with self._timed("eval"):
            self._draw()
            if self.device.type == "cpu":  # a peak measured on a busy machine is too low
                self.peak = max(self.peak, peak_flops(self.device, self.dtype)[0])
        return self.val_loss

    def sample(self) -> str:
        """Text from the model as it is, into `samples/`; every rank computes, the first one writes."""
        config, tokenizer = self.config, self.tokenizer
        with self._timed("sample"):
            ids = generate(
                self.model,
                ([] if tokenizer.eot is None else [tokenizer.eot]) + tokenizer.encode(config.sample_prompt),
                config.sample_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                vocab_size=tokenizer.vocab_size,
                seed=config.seed + self.iteration,
                device=self.device,
                dtype=self.dtype,
                should_stop=lambda: any_rank(self.stop_signal is not None, self.world, self.device),
            )
        text = config.sample_prompt + tokenizer.decode(ids)
        if self.world.is_main:
            with self.log.beside("samples"):
                folder = self.log.out_dir / "samples"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"iter_{self.iteration:08d}.txt").write_text(text, encoding="utf-8")
        self.log.note(f"iter {self.iteration}/{config.max_iters} | sample of {len(ids)} tokens:\n{text}")
        self.log.metrics("sample", self.iteration, tokens=len(ids))
        return text

    def save(self) -> None:
        """A checkpoint of this iteration; `best` names it when its validation loss is the lowest so far."""
        is_best = self.val_loss < self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, self.val_loss)
        state = {
            "iteration": self.iteration,
            "loader": self.loader.state_dict(),
            "val_loss": self.val_loss if math.isfinite(self.val_loss) else None,
            "best_val_loss": self.best_val_loss if math.isfinite(self.best_val_loss) else None,
            "scaler": self.engine.scaler.state_dict(),
            "tokens_per_iteration": self.tokens_per_iteration,
            "ranks": self.world.size,
            "tokenizer": self.train_data.meta.tokenizer,
            "vocab_size": self.train_data.meta.vocab_size,
            "arguments": dataclasses.asdict(self.config) | {"fresh": False},
        }
        with self._timed("save"):
            path = self.checkpoints.save(self.model, self.engine.optimizer, state, self.device, is_best=is_best)
        self.log.note(f"iter {self.iteration}/{self.config.max_iters} | checkpoint {path}")

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it does not fit the data, the model, the size of the global batch or, with 8-bit moments, the
                number of processes.
        """
        known = self.checkpoints.read_state(path)
        if known["tokens_per_iteration"] != self.tokens_per_iteration:
            raise InputError(
                f"--batch_size × --grad_accum_steps × devices × block_size: the run in {self.config.out_dir} has "
                f"{known['tokens_per_iteration']} tokens per iteration, this start has {self.tokens_per_iteration}"
            )
        if self.config.optimizer == "adamw8bit":
            had = known["ranks"] // known["arguments"].get("dp_replicate", 1)
            have = self.world.size // self.config.dp_replicate
            if had != have:
                raise InputError(
                    f"--optimizer adamw8bit: the run in {self.config.out_dir} has its moments in the parts of {had} "
                    f"processes, this start has {have}; their blocks cannot be cut anew (processes / --dp_replicate)"
                )
        self.loader.load_state_dict(known["loader"])
        state = self.checkpoints.load(path, self.model, self.engine.optimizer, self.device)
        self.iteration = state["iteration"]
        self.val_loss, self.best_val_loss = (
            math.inf if state[name] is None else state[name] for name in ("val_loss", "best_val_loss")
        )
        if state["scaler"]:
            self.engine.scaler.load_state_dict(state["scaler"])

    # Logging

    def _reduce(self, step: Step) -> dict[str, Any]:
        """The deterministic values of a log line, over all ranks."""
        layers = step.balance.numel()
        by_bias = self.model_config.router_balance == "bias"
        aux_coef = auto_aux_coef(self.model_config.num_experts) if by_bias else self.engine.aux_coef
        means = all_sum(torch.cat((step.loss.reshape(1), step.balance, step.z)).double(), self.world) / self.world.size
        balance = means[1 : 1 + layers]
        values = {
            "loss": float(means[0]),
            "lr": self.config.learning_rate(self.iteration - 1),
            "grad_norm": step.grad_norm,
            "router_aux": aux_coef * (float(balance.mean()) - 1),
            "tokens": self.iteration * self.tokens_per_iteration,
        }
        if self.config.log_router_stats:
            values |= {"balance_per_layer": balance.tolist(), "router_z": float(means[1 + layers :].mean())}
        return values

    def _log_step(self, step: Step, iterations: int, seconds: float) -> None:
        """A train line. Its speed counts the steps and their wait for data; evaluation, saving, sampling are apart."""
        config, spent = self.config, self.seconds
        beside = spent["eval"] + spent["save"] + spent["sample"]
        tokens = iterations * self.tokens_per_iteration
        rate = tokens / max(seconds - beside, 1e-9)
        flops = rate * self.model_config.flops_per_token(config.block_size)
        clock = {
            "tokens_per_second": rate,
            "mfu": flops / (self.peak * self.world.size) if self.peak else None,
            "data_wait": spent["data_wait"] / max(seconds - beside, 1e-9),
            "memory": memory_used(self.device),
            "eta": (config.max_iters - self.iteration) * seconds / iterations,
            "seconds": seconds,
            **{f"{name}_seconds": spent[name] for name in ("data_wait", "eval", "save", "sample")},
        }
        values = self._reduce(step)
        self.log.metrics("train", self.iteration, **values, **clock)
        self.log.note(format_train_line(self.iteration, config.max_iters, {**values, **clock}))
        # A drop is judged by the clock on the wall, so that its cause can be an evaluation or a checkpoint.
        for sign in self.signs.check({**values, **clock, "tokens_per_second": tokens / seconds}):
            self.log.warn(sign)

    def _check_numbers(self, step: Step) -> None:
        """Count iterations that were skipped for want of a finite gradient; give up after too many in a row.

        Loss scaling of fp16 skips some by design, when it finds its scale.
        """
        self.bad_steps = 0 if step.applied else self.bad_steps + 1
        if step.applied:
            return
        state = self.loader.state_dict()
        skipped, kept = "the update is", "those before them"
        if self.engine.in_backward:
            skipped = "the update of every parameter whose gradient is not finite is"
            kept = "updated where gradients were finite"
        self.log.warn(
            f"iter {self.iteration}: gradient norm {step.grad_norm}, {skipped} skipped on all ranks "
            f"(batch before window {state['window']} of epoch {state['epoch']})"
        )
        if self.bad_steps >= MAX_BAD_STEPS:
            self.save()
            raise InputError(
                f"{self.bad_steps} iterations in a row without a finite gradient: stopped; the weights are {kept} "
                f"(checkpoint {self.iteration}); lower --lr"
            )

    # The run

    def run(self, log: RunLog) -> int:
        """Train to max_iters; returns the exit status.

        A stop signal ends it after the current iteration, with a checkpoint; a second SIGINT at once.
        """
        self.log = log
        self.peak, peak_source = peak_flops(self.device, self.dtype)
        for note in (self.dtype_note, *self.notes, f"mfu is against {peak_source}"):
            if note:
                log.note(note)
        try:
            with self.signals:
                if any_rank(self.stop_signal is not None, self.world, self.device):  # while the run was starting up
                    return self._leave()
                return self._run()
        finally:
            self.loader.close()

    def _draw(self) -> None:
        if self.world.is_main:
            clip, warmup = self.config.grad_clip or None, self.config.warmup_iters
            with self.log.beside("plots"):
                draw_plots(self.log.out_dir, grad_clip=clip, warmup_iters=warmup)

    def _due(self, every: int) -> bool:
        return bool(every) and (self.iteration % every == 0 or self.iteration == self.config.max_iters)

    def _run(self) -> int:
        config = self.config
        if self.iteration == 0 and config.eval_interval:
            self.evaluate()
        if self.iteration >= config.max_iters:
            self.log.note(f"already at iteration {self.iteration} of {config.max_iters}: nothing to do")
        self.seconds.clear()
        begin, logged = time.perf_counter(), self.iteration
        while self.iteration < config.max_iters:
            step = self.train_step()
            self._check_numbers(step)
            if self._due(config.log_interval):
                now = time.perf_counter()
                self._log_step(step, self.iteration - logged, now - begin)
                begin, logged = now, self.iteration
                self.seconds.clear()
            stopping = any_rank(self.stop_signal is not None, self.world, self.device)
            if not stopping and self._due(config.eval_interval):
                self.evaluate()
            if not stopping and self._due(config.sample_every):
                self.sample()
            if stopping or self._due(config.save_every) or self.iteration == config.max_iters:
                self.save()
            if stopping or any_rank(self.stop_signal is not None, self.world, self.device):
                return self._stopped()
        self._draw()
        return 0

    def _stopped(self) -> int:
        if self.checkpoints.latest() is None or self.checkpoints.latest().name[-8:] != f"{self.iteration:08d}":
            self.save()
        return self._leave()

    def _leave(self) -> int:
        number = self.stop_signal or signal.SIGTERM
        self.log.note(
            f"stopped by {signal.Signals(number).name} at iteration {self.iteration}; the same command resumes it"
        )
        return 128 + number
