"""vLLM's worker with our own sampling and capture: the class that vLLM starts on each rank, by name.

It wraps two steps of the model runner, the forward and the sampling, and nothing of vLLM's scheduling or kernels. Imported only
where vLLM is installed; :mod:`vllm_engine` talks to it by method names, in bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from fpforensics.common.engines import vllm_compat as compat
from fpforensics.common.engines.concurrent_work import ThreadedLoad, load_on
from fpforensics.common.engines.transformers_capture import decoder_blocks
from fpforensics.common.engines.vllm_capture import Recorder
from fpforensics.common.engines.vllm_facts import worker_facts
from fpforensics.common.engines.vllm_jobs import Job, Report, pack, unpack
from fpforensics.common.engines.vllm_taps import Taps


class EvidenceWorker(compat.platform_worker()):  # type: ignore[misc]
    """A rank of vLLM. Without a job it serves as vLLM's own worker does."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights, then put our hooks in: before anything is compiled."""
        compat.prepare_kernels(self.vllm_config)
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        depth = compat.depth(runner)
        self._taps = Taps(decoder_blocks(runner.get_model(), depth))
        if (capacity := compat.graph_tokens(self.vllm_config)) is not None:
            self._taps.build_in(capacity, compat.width(runner), runner.dtype, runner.device)
        self._recorder: Recorder | None = None
        self._load: ThreadedLoad | None = None
        forward, sample = runner._model_forward, runner._sample

        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            if self._recorder is None:
                return forward(*args, **kwargs)
            self._recorder.before_forward(*compat.batch_of(runner))
            output = forward(*args, **kwargs)
            self._recorder.after_forward(output)
            return output

        def recorded_sample(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._recorder is None:
                return sample(logits, *args, **kwargs)
            return compat.sampled(self._recorder.choose_tokens(logits))

        runner._model_forward, runner._sample = recorded_forward, recorded_sample

    def evidence_begin(self, data: bytes) -> None:
        """From now on, every request is one of this job's (:class:`Job`)."""
        job = unpack(data, Job)
        runner = self.model_runner
        with torch.inference_mode():
            self._taps.plant(job.blocks if job.capture else [])
        self._recorder = Recorder(job, self._taps, runner.model.compute_logits, runner.device, compat.ranks())

    def evidence_finish(self, alone: bool) -> Report | bytes:
        """The job is done: what this rank recorded; packed, unless it is ``alone`` and so in the engine's own process."""
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        try:
            with torch.inference_mode():
                report = recorder.finish()
        finally:
            self._taps.remove()
        return report if alone else pack(report)

    def evidence_abandon(self) -> None:
        """Forget the job, if there is one."""
        self._recorder = None
        self._taps.remove()

    def evidence_load_begin(self) -> None:
        """Run this rank's concurrent work from now on."""
        self._load = self._load or load_on(str(self.model_runner.device))
        self._load.begin()

    def evidence_load_end(self) -> bytes:
        """What it did since (:class:`ConcurrentWork`)."""
        assert self._load is not None
        return pack(self._load.end())

    def evidence_load_abandon(self) -> None:
        """End it, if it runs."""
        if self._load is not None:
            self._load.abandon()

    def evidence_facts(self) -> bytes:
        """What this rank resolved (:class:`WorkerFacts`); asked when every rank has started."""
        compat.unname_shared_memory()
        return pack(worker_facts(self.model_runner, self.vllm_config))
