"""The training loop: one `Trainer` a process, from data to checkpoints.

`router_aux` in the logs is coef · (mean over layers of balance − 1): 0 when experts are used equally. Where biases
balance the experts, coef is there what `auto` would be without them, so that it still tells.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_engine.generate import generate
from moe_engine.model import Transformer
from moe_engine.train import memory, parallel, skips
from moe_engine.train.checkpoint import Checkpoints, Published
from moe_engine.train.config import TrainConfig, auto_aux_coef
from moe_engine.train.data import Batch, TokenDataset, TrainLoader, ValLoader
from moe_engine.train.device import DTYPES, memory_total, memory_used, peak_flops, pick_dtype
from moe_engine.train.environment import git_commit, versions
from moe_engine.train.errors import InputError
from moe_engine.train.liveness import Liveness, collective_limit
from moe_engine.train.metrics import RunLog
from moe_engine.train.parallel import World, agree, all_sum, gathered
from moe_engine.train.plots import draw_plots
from moe_engine.train.signals import StopSignals
from moe_engine.train.signs import WarningSigns, format_train_line
from moe_engine.train.step import Engine, Step, build_model
from moe_engine.train.tokenizer import check_spec, load_tokenizer


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
        self.checkpoints = Checkpoints(Path(config.out_dir), world, config.keep_last_n, config.async_save)

        self.iteration = 0
        self.val_loss = self.best_val_loss = math.inf
        self.undone = ["evaluate"] if config.eval_interval else []  # what is due at this iteration, in order
        self._ready: list[Batch] = []  # of the next iteration
        self._ready_from: dict[str, Any] = {}  # where in the data they begin
        self._saved_at: int | None = None  # the iteration of the newest checkpoint, published or not yet
        self._retry_at: int | None = None  # when to try again to write one
        self.counters: dict[str, Any] = {"skipped": 0, "skipped_in_a_row": 0}  # a part of the checkpoint
        self.signals = StopSignals()
        self.stopping = False  # agreed by all ranks, as is what follows
        self.stopped_by = 0  # the signal, if it was one
        self.problem = ""  # with the data of some rank
        self.seconds: dict[str, float] = defaultdict(float)  # since the last log line, by what they went to
        self.signs = WarningSigns()
        self.liveness: Liveness | None = None  # who watches that this process moves
        self.checkpoints.waiting = self._keep_alive

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
        limit = collective_limit(config.timeout)
        sharded = parallel.start(self.world, self.device, self.dtype, config.cpu_offload, param_dtype, limit)
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
        return c.batch_size * c.block_size * self.engine.grad_accum_steps * self.world.size

    # One iteration

    def _batches(self) -> Iterator[Batch]:
        """Those of the next iteration, as they are read."""
        if self._ready:
            ready, self._ready = self._ready, []
            for batch in ready:
                self.beat("step")
                yield batch
            return
        for _ in range(self.engine.grad_accum_steps):
            self.beat("data")
            batch = self.loader.next_batch()
            self.seconds["data_wait"] += self.loader.wait_seconds
            self.beat("step")
            yield batch

    def _read_ahead(self) -> str | None:
        """Have the next iteration's batches before any rank begins it; returns what went wrong with this rank's."""
        self._ready_from = self.position
        try:
            self._ready = list(self._batches())
        except InputError as error:
            self.loader.load_state_dict(self._ready_from)  # the micro-steps that could be read are not consumed
            return str(error)
        return None

    @property
    def position(self) -> dict[str, Any]:
        """Where in the data the next iteration begins."""
        return self._ready_from if self._ready else self.loader.state_dict()

    def train_step(self) -> Step:
        """The next iteration."""
        step = self.engine.step(self._batches(), self.iteration)
        self.iteration += 1
        self.beat("log")
        return step

    def beat(self, what: str) -> None:
        """Say that this process gets on; every rank must, at the same points."""
        if self.liveness is not None:
            self.liveness.beat(self.iteration, what)

    def _keep_alive(self) -> None:
        if self.liveness is not None:
            self.liveness.keep_alive()

    # What the ranks agree on

    def _poll(self, problem: str | None = None) -> bool:
        """Whether all ranks are to stop, because one has had a signal or cannot read its data.

        Every rank calls this before each iteration, batch of an evaluation and token of a sample. A checkpoint that all
        have written by now is published.

        Args:
            problem: what this rank's data suffers from.
        """
        if self.stopping:
            return True
        number, failed, writing, pending = agree(
            [self.signals.number or 0, int(problem is not None), int(self.checkpoints.writing),
             int(self.checkpoints.pending is not None)], self.world, self.device,
        )  # fmt: skip
        if pending and not writing:
            self._settle(self.checkpoints.settle)
        if failed:
            texts = enumerate(gathered(problem, self.world))
            where = (f"rank {rank}: " if self.world.size > 1 else "" for rank in range(self.world.size))
            self.problem = "; ".join(f"{w}{text}" for w, (_, text) in zip(where, texts, strict=True) if text)
        self.stopped_by = number  # a signal that has come since is left for the next time
        self.stopping = bool(number or failed)
        return self.stopping

    # Beside the steps

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.beat(name)
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Validation loss in nats per token, over the same windows every time and whatever the number of ranks.

        None, and nothing has happened, when the run is to stop meanwhile.
        """
        with self._timed("eval"):
            sums = torch.zeros(2, dtype=torch.float64, device=self.device)
            counts: Tensor | int = 0
            batches = iter(self.val_loader)
            for _ in range(len(self.val_loader)):
                self.beat("eval")
                problem = None
                try:
                    inputs, targets = next(batches)
                except InputError as error:  # on this rank alone, perhaps: the others must hear of it
                    problem = str(error)
                if self._poll(problem):
                    return None
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

    def sample(self) -> str | None:
        """Text from the model as it is, into `samples/`; every rank computes, the first one writes.

        None, and nothing has happened, when the run is to stop meanwhile.
        """
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
                should_stop=self._stop_sampling,
            )
        if self.stopping:
            return None
        text = config.sample_prompt + tokenizer.decode(ids)
        if self.world.is_main:
            with self.log.beside("samples"):
                folder = self.log.out_dir / "samples"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"iter_{self.iteration:08d}.txt").write_text(text, encoding="utf-8")
        self.log.note(f"iter {self.iteration}/{config.max_iters} | sample of {len(ids)} tokens:\n{text}")
        self.log.metrics("sample", self.iteration, tokens=len(ids))
        return text

    def _stop_sampling(self) -> bool:
        self.beat("sample")
        return self._poll()

    def save(self) -> None:
        """Begin a checkpoint of this iteration; `best` names it when its validation loss is the lowest so far.

        One that cannot be written is reported; training goes on, and the next attempt comes soon.
        """
        self.finish_save()
        is_best, previous_best = self.val_loss < self.best_val_loss, self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, self.val_loss)
        state = {
            "iteration": self.iteration,
            "loader": self.position,
            "undone": [] if self.undone == ["save"] else self.undone,
            "val_loss": self.val_loss if math.isfinite(self.val_loss) else None,
            "best_val_loss": self.best_val_loss if math.isfinite(self.best_val_loss) else None,
            "scaler": self.engine.scaler.state_dict(),
            "counters": {**self.counters, "spike_history": self.engine.guard.state_dict()},
            "tokens_per_iteration": self.tokens_per_iteration,
            "ranks": self.world.size,
            "tokenizer": self.train_data.meta.tokenizer,
            "vocab_size": self.train_data.meta.vocab_size,
            "arguments": dataclasses.asdict(self.config) | {"fresh": False},
            "code": self.code,
        }
        self._best_if_lost = previous_best
        self._saved_at, self._retry_at = self.iteration, None
        with self._timed("save"):
            try:
                self.checkpoints.save(self.model, self.engine.optimizer, state, self.device, is_best=is_best)
            except OSError as error:
                self._save_failed(error)

    @cached_property
    def code(self) -> dict[str, Any]:
        """Which code runs."""
        return {"versions": versions("moe-engine"), "git": git_commit()}

    def finish_save(self) -> None:
        """Wait for the checkpoint on its way, if there is one."""
        self._settle(self.checkpoints.finish)

    def _settle(self, publish: Callable[[], Published | None]) -> None:
        """Publish the checkpoint on its way, if there is one, and say so."""
        with self._timed("save"):
            try:
                published = publish()
            except OSError as error:
                self._save_failed(error)
                return
        if published is None:
            return
        if published.note:
            self.log.warn(published.note)
        size, took = published.bytes, max(published.write_seconds, 1e-9)
        self.log.note(
            f"iter {self.iteration}/{self.config.max_iters} | checkpoint {published.path} "
            f"({size / 1e9:.2f} GB in {took:.1f} s; training waited {published.stall_seconds:.2f} s)"
        )
        self.log.metrics(
            "save", int(published.path.name[-8:]), bytes=size, write_seconds=took, stall_seconds=published.stall_seconds
        )

    def _save_failed(self, error: OSError) -> None:
        """Training need not end for want of a checkpoint: it has what is to be written, and tries again soon."""
        self._saved_at, self.best_val_loss = None, self._best_if_lost
        self._save_error = error
        self._retry_at = self.iteration + max(1, self.config.save_every // 10)
        try:
            newest = self.checkpoints.latest() or "no checkpoint"
        except OSError:  # the disk is gone altogether
            newest = "the one before it"
        self.log.warn(
            f"iter {self.iteration}: {error.strerror or error}; {newest} is the newest; training "
            f"goes on, and tries again at iteration {self._retry_at} or at its end"
        )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it does not fit the data, the model, the size of the global batch or, with 8-bit moments, the
                number of processes.
        """
        known = self.checkpoints.read_state(path)
        self._keep_global_batch(known)
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
        self.iteration = self._saved_at = state["iteration"]
        intervals = {"evaluate": self.config.eval_interval, "sample": self.config.sample_every, "save": 1}
        self.undone = [name for name in state["undone"] if intervals[name]]
        self.val_loss, self.best_val_loss = (
            math.inf if state[name] is None else state[name] for name in ("val_loss", "best_val_loss")
        )
        if state["scaler"]:
            self.engine.scaler.load_state_dict(state["scaler"])
        counters = state.get("counters", {})  # an older checkpoint has none
        self.counters |= {name: counters[name] for name in self.counters if name in counters}
        self.engine.guard.load_state_dict(counters.get("spike_history", {}))

    def _keep_global_batch(self, known: dict[str, Any]) -> None:
        """Other processes than the run had before: other micro-steps, so that the tokens of an iteration stay."""
        configured, steps = self.config.grad_accum_steps, parallel.accumulation_for(self.config, known, self.world.size)
        self.engine.grad_accum_steps = steps
        if steps != configured:
            self.notes.append(
                f"{self.world.size} process(es): --grad_accum_steps {steps} in place of {configured}, so that an "
                f"iteration stays at {known['tokens_per_iteration']} tokens"
            )

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
            "skipped": self.counters["skipped"],
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
        """Count iterations that were skipped and say where their data is; give up after too many in a row.

        Loss scaling of fp16 skips some by design, when it finds its scale. Every rank must call it.
        """
        counters = self.counters
        if step.applied:
            counters["skipped_in_a_row"] = 0
            return
        counters["skipped"] += 1
        counters["skipped_in_a_row"] += 1
        in_a_row = counters["skipped_in_a_row"]
        losses = skips.losses_of_all_ranks(step.losses, self.world)
        skipped, kept = "the update is", "of the last good state"
        if self.engine.in_backward and all(math.isfinite(loss) for row in losses for loss in row):
            skipped = "the update of every parameter whose gradient is not finite is"
            kept = "with the weights updated where gradients were finite"
        self.log.warn(
            f"iter {self.iteration}: {step.reason}: {skipped} skipped on all ranks ({in_a_row} in a row, "
            f"{counters['skipped']} in all); {skips.coordinates(self.loader, losses)}"
        )
        if in_a_row < self.config.max_bad_steps:
            return
        counters["skipped_in_a_row"] = 0  # whoever goes on from here starts counting anew
        self._save_for_good()
        remedy = "raise --skip_spikes or " if "spike" in step.reason else ""
        raise InputError(
            f"{in_a_row} iterations in a row skipped, the last for {step.reason}: stopped with a checkpoint {kept} "
            f"(iteration {self.iteration}); the same command goes on behind their data; if it stops again, {remedy}"
            "start with a lower --lr in another --out_dir"
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
        if self.iteration >= config.max_iters:
            self.log.note(f"already at iteration {self.iteration} of {config.max_iters}: nothing to do")
        self._do_due()
        self.seconds.clear()
        begin, logged = time.perf_counter(), self.iteration
        while self.iteration < config.max_iters and not self._poll(self._read_ahead()):
            step = self.train_step()
            self._check_numbers(step)
            if self._due(config.log_interval):
                now = time.perf_counter()
                self._log_step(step, self.iteration - logged, now - begin)
                begin, logged = now, self.iteration
                self.seconds.clear()
            saving = self._due(config.save_every) or self.iteration in (self._retry_at, config.max_iters)
            due = (self._due(config.eval_interval), self._due(config.sample_every), saving)
            self.undone = list(itertools.compress(("evaluate", "sample", "save"), due))
            self._do_due()
        self._save_for_good()
        if self.stopping:
            return self._stopped()
        self._draw()
        return 0

    def _do_due(self) -> None:
        """Evaluate, sample and save as is due at this iteration; what a stop keeps from it stays in `undone`."""
        while self.undone and not self.stopping:
            getattr(self, self.undone[0])()
            if not self.stopping:
                self.undone.pop(0)

    def _save_for_good(self) -> None:
        """Have a checkpoint of this iteration on the disk.

        Raises:
            InputError: it could not be written.
        """
        if self.iteration and self._saved_at != self.iteration:
            self.save()
        self.finish_save()
        if self.iteration and self._saved_at != self.iteration:
            error = self._save_error
            raise InputError(f"{error.filename}: {error.strerror}; the last whole checkpoint stays") from error

    def _stopped(self) -> int:
        at = f"at iteration {self.iteration}"
        if self.problem:
            raise InputError(f"{self.problem}; stopped {at}; once it is repaired, the same command goes on")
        self.log.note(f"stopped by {signal.Signals(self.stopped_by).name} {at}; the same command resumes it")
        return 128 + self.stopped_by
