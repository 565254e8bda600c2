"""What a GPU would object to, found without one. Tensors without data on a device of their own ("meta") stand in for it:
whatever mixes devices, or asks such a tensor for its numbers, raises. Casts are made as autocast makes them on CUDA."""

from unittest import mock

import numpy as np
import pytest
import torch
from small import FAST, FAST_FOR
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import data
import train
from engine.batches import augmented
from engine.config import MAX_GRAD_NORM, ema_decay, grouping_of, parse_config
from engine.run import autocast, build_optimizer, build_run
from readers.synthetic import Synthetic
from sampler import GroupedBatchSampler

# as PyTorch documents it, what occurs here of it ("Autocast Op Reference")
IN_BF16 = {"linear", "conv1d", "conv2d", "scaled_dot_product_attention", "matmul", "__matmul__"}
IN_FP32 = {"layer_norm", "cross_entropy", "mse_loss", "log_softmax", "softmax", "normalize", "norm"}
IN_FP32 |= {"exp", "log", "sum", "pow", "__pow__", "cumsum"}


class CudaAutocast(TorchFunctionMode):
    """In place of torch.autocast."""

    active = []

    def __init__(self, device_type, dtype=torch.float32, enabled=True):
        super().__init__()
        self.enabled = enabled

    def __enter__(self):
        self.active.append(self.enabled)
        return super().__enter__()

    def __exit__(self, *error):
        self.active.pop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, to = kwargs or {}, None
        if func.__name__ in IN_BF16:
            to = torch.bfloat16
        if func.__name__ in IN_FP32:
            to = torch.float32
        if to and self.active[-1]:

            def cast(x):
                return x.to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

            args = tuple(map(cast, args))
            kwargs = {key: cast(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.ndim:
            assert result.dtype != torch.float64, f"{func.__name__} in float64, which a Mac lacks"
        return result


def eight(mask, *tensors):
    """In place of `gather_masked`, the one question that masks and losses ask: as if eight tokens were masked."""
    return [x.flatten(0, 1)[:8] for x in tensors]


def on_stand_in(run):
    """A run made on the CPU, moved; past every warm-up."""
    run.device, run.step, run.generator = torch.device("meta"), 10**6, torch.Generator()
    run.model.to(run.device)
    run.momentum.to(run.device)
    run.queue = [part.to(run.device) for part in run.queue]
    for table in ("replacement_ids", "swaps"):
        setattr(run, table, getattr(run, table).to(run.device))
    run.optimizer = build_optimizer(run.model, run.config)
    run.sampler = GroupedBatchSampler(np.arange(8)[None], 8, mode=grouping_of(run.config))
    return run


TRUE = ["--patch-mask", "oracle", "--word-mask", "oracle"]


@pytest.mark.parametrize(("recipe", "flags"), [*((recipe, []) for recipe in train.RECIPES), ("syncmask", TRUE)])
def test_a_step_mixes_neither_devices_nor_types(recipe, flags):
    more = [*flags, "--fusion-layers", "2", "--precision", "bf16", "--queue-size", "6", "--alpha", "0.4"]
    config, _ = parse_config([*FAST, *FAST_FOR[recipe], "--recipe", recipe, *more])
    dataset = Synthetic("train", 8, 32, progress=False)
    dataset.prompts, dataset.with_ground_truth = config.prompts, bool(flags)
    tokenizer = data.build_tokenizer(dataset.captions, 300, config.model.max_length, prompts=config.prompts)
    informative = data.informative_pieces(tokenizer, dataset.captions)
    batch = data.Collate(tokenizer, informative)([dataset[row] for row in range(8)])
    run = on_stand_in(build_run(config, dataset, tokenizer))
    gpu = FakeTensorMode(allow_non_fake_inputs=True)
    gpu.allow_meta = True
    counted = mock.patch("train.gather_masked", eight), mock.patch("masking.gather_masked", eight)
    with gpu, mock.patch("torch.autocast", CudaAutocast), counted[0], counted[1]:
        batch = data.to_device(batch, run.device)
        with autocast(run):
            losses, _ = run.model(train.RECIPES[recipe], run, augmented(run, batch))
        loss = sum(losses.values())
        assert loss.device.type == "meta" and loss.dtype == torch.float32
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
        assert norm.device.type == "meta"
        run.model.clamp_temp()
        run.momentum.update(run.model, ema_decay(run.step, config.ema_decay))
    assert grouping_of(config) == "random" or len(run.sampler._pool) == 1
