"""Everything that people do with a Trainer, with the callback in it: FP16, an overflow in the second step, the truth."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_amp import AttachError, EventKind, MixedPrecisionCallback, MixedPrecisionConfig, ScalingStrategy
from tests.integrations.trainers import (
    OverflowAt,
    Regression,
    all_finite,
    arguments,
    logged,
    numbers,
    parameters_of,
    regression_trainer,
    text,
    tiny_gpt2,
)

if TYPE_CHECKING:
    from datasets import Dataset

STEPS = 3


def assert_told_truthfully(trainer: Trainer, callback: MixedPrecisionCallback, steps: int = STEPS) -> None:
    """All steps but the second were applied, and everybody says so."""
    figures = callback.session.metrics()
    assert (figures["applied_steps"], figures["skipped_steps"]) == (steps - 1, 1)
    skips = [event.step for event in callback.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert skips == [2]
    assert trainer.state.global_step == steps
    assert all_finite(trainer)
    assert [norm is None for norm in logged(trainer, "grad_norm")] == [step == 1 for step in range(steps)]
    assert not any(torch.tensor(loss).isnan() for loss in logged(trainer, "loss"))


def trained(trainer: Trainer, callback: MixedPrecisionCallback) -> Trainer:
    """Trains and checks."""
    before = parameters_of(trainer)
    trainer.train()
    assert_told_truthfully(trainer, callback)
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters_of(trainer), strict=True))
    return trainer


def tiny_t5(**options: Any) -> T5ForConditionalGeneration:
    """One layer each way, width 16, over bytes."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=256, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, **options,
        )
    )  # fmt: skip


def tiny_bert() -> BertForSequenceClassification:
    """One layer, width 16, over bytes; two classes."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def tiny_vit() -> ViTForImageClassification:
    """One layer, width 16, over 8 by 8 pixels; ten classes."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4, num_channels=1, num_labels=10,
        )
    )  # fmt: skip


def labelled(name: str, values: Any, classes: int) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({name: values, "labels": [row % classes for row in range(len(values))]})


TASKS: dict[str, tuple[Callable[[], Any], Callable[[], Dataset]]] = {
    "causal LM": (tiny_gpt2, text),
    "classification": (tiny_bert, lambda: labelled("input_ids", text()["input_ids"], 2)),
    "vision": (tiny_vit, lambda: labelled("pixel_values", torch.rand(64, 1, 8, 8).tolist(), 10)),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks(tmp_path: Path, task: str) -> None:
    """Language, sequence classification and images."""
    make_model, make_data = TASKS[task]
    set_seed(0)
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    options = arguments(tmp_path, max_steps=STEPS)
    trained(Trainer(make_model(), options, train_dataset=make_data(), callbacks=[callback, OverflowAt(2)]), callback)


def test_seq2seq(tmp_path: Path) -> None:
    """Seq2SeqTrainer on a T5, with generation in evaluation and predict."""
    set_seed(0)
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    options = Seq2SeqTrainingArguments(
        str(tmp_path), fp16=True, use_cpu=True, max_steps=STEPS, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, predict_with_generate=True, generation_max_length=4,
        per_device_train_batch_size=4, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    rows = text().select(range(32))
    trainer = Seq2SeqTrainer(
        tiny_t5(), options, train_dataset=rows, eval_dataset=rows, callbacks=[callback, OverflowAt(2)]
    )
    trained(trainer, callback)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluated["amp/eval_non_finite_batches"] == 0
    assert len(trainer.predict(rows, max_length=4).predictions) == 32


# The latter is its earlier name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3, "lr_scheduler_type": "cosine"},
        {"optim": "adamw_torch_fused", "max_grad_norm": 1e-3},
        {"optim": "adamw_torch", "max_grad_norm": 0.0, "weight_decay": 0.1},
        {"optim": "sgd", "label_smoothing_factor": 0.1},
        {"optim": "adafactor", "lr_scheduler_type": "constant"},
        {CHECKPOINTING: True, "neftune_noise_alpha": 5.0},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_training_arguments(tmp_path: Path, options: dict[str, Any]) -> None:
    """Each way to train that TrainingArguments offers and precision meets; two at a time where they do not meet."""
    set_seed(0)
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = Trainer(
        tiny_gpt2(),
        arguments(tmp_path, max_steps=STEPS, **options),
        train_dataset=text(),
        callbacks=[callback, OverflowAt(2)],
    )
    trained(trainer, callback)


def test_reduce_lr_on_plateau(tmp_path: Path) -> None:
    """The schedule follows the evaluation loss, in a run whose evaluation loss is whole."""
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = regression_trainer(
        tmp_path, callback, OverflowAt(2), fp16=True, max_steps=STEPS, lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5}, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="loss", eval_dataset=numbers(), learning_rate=10.0,
    )  # fmt: skip
    trained(trainer, callback)
    assert trainer.lr_scheduler.get_last_lr()[0] < 10.0


def test_custom_losses(tmp_path: Path) -> None:
    """An overridden compute_loss and a compute_loss_func."""

    class Doubled(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * 2

    def absolute(outputs: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return (outputs["logits"] - labels).abs().mean()

    for folder, cls, given in (("a", Doubled, {}), ("b", Trainer, {"compute_loss_func": absolute})):
        callback = MixedPrecisionCallback({"init_scale": 1024.0})
        trainer = cls(
            Regression(),
            arguments(tmp_path / folder, max_steps=STEPS),
            train_dataset=numbers(),
            callbacks=[callback, OverflowAt(2)],
            **given,
        )
        trained(trainer, callback)


def test_a_trainer_that_logs_losses_of_its_own(tmp_path: Path) -> None:
    """An overridden compute_loss logs each batch's loss: that is no training entry, and the Trainer's mean stays its mean."""

    class Telling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.log({"loss": loss.item(), "batch": 1.0})
            return loss

    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = Telling(
        Regression(),
        arguments(tmp_path, max_steps=STEPS, logging_steps=STEPS),
        train_dataset=numbers(),
        callbacks=[callback, OverflowAt(2)],
    )
    result = trainer.train()
    *batches, entry, _ = trainer.state.log_history
    mean = sum(batch["loss"] for batch in batches) / STEPS
    assert entry["loss"] == pytest.approx(mean)
    assert result.training_loss == pytest.approx(mean)
    assert not any(name.startswith("amp/") for batch in batches for name in batch)
    assert entry["amp/skipped_steps"] == 1
    assert "step 2" in entry["amp_incident"]


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_full_eval(tmp_path: Path, half: str) -> None:
    """Evaluation and prediction in half parameters, after training; a model that overflows there is told of."""
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = regression_trainer(
        tmp_path, callback, OverflowAt(2), fp16=True, max_steps=STEPS, eval_dataset=numbers(), **{f"{half}_full_eval": True}
    )  # fmt: skip
    trained(trainer, callback)
    trainer.data_collator = lambda rows: {
        name: torch.tensor([row[name] for row in rows], dtype=getattr(torch, {"fp16": "half"}.get(half, "bfloat16")))
        for name in ("x", "labels")
    }  # fmt: skip
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(numbers()).predictions.shape == (64,)
    with torch.no_grad():
        trainer.model.output.weight.fill_(6e4)
    trainer.evaluate()
    lost = [e for e in callback.session.events if e.kind is EventKind.EVALUATION_LOST_BATCHES]
    assert len(lost) == 1  # autocast to FP16 casts BF16 operands too


def test_best_model_and_early_stopping(tmp_path: Path) -> None:
    """The best checkpoint comes back at the end, and a run that gets worse stops."""
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = regression_trainer(
        tmp_path, callback, OverflowAt(2), EarlyStoppingCallback(1), fp16=True, max_steps=9, optim="sgd",
        learning_rate=30.0, lr_scheduler_type="constant", load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, eval_dataset=numbers(),
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert Path(best).name == "checkpoint-1"
    assert trainer.state.global_step < 9
    expected = Regression()
    expected.load_state_dict(load_file(Path(best) / "model.safetensors"))
    for a, b in zip(expected.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


class StepsInBackward(torch.optim.SGD):
    """What LOMO is to accelerate: an optimizer whose `fused_backward` takes the step."""

    def fused_backward(self, loss: torch.Tensor, lr: float) -> None:
        loss.backward()
        self.step()


def layerwise(model: torch.nn.Module) -> torch.optim.Optimizer:
    """What transformers makes of `galore_adamw_layerwise` and its kin: an optimizer for each parameter, and a dummy."""
    each = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
    for parameter in each:
        parameter.register_post_accumulate_grad_hook(lambda p: each[p].step())
    return LayerWiseDummyOptimizer(optimizer_dict=each, lr=0.01)


def lomo(model: torch.nn.Module) -> torch.optim.Optimizer:
    return StepsInBackward(model.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("make", "precision"), [(layerwise, "fp16"), (layerwise, "fp32"), (lomo, "bf16"), (lomo, "fp16")]
)
def test_an_optimizer_that_steps_inside_of_backward_is_a_clear_error(
    tmp_path: Path, make: Callable[[torch.nn.Module], torch.optim.Optimizer], precision: str
) -> None:
    """Nothing can look at its gradients before they are applied: it would be told of as sound, whatever they are."""

    def trainer(config: dict[str, Any]) -> Trainer:
        model = Regression()
        return Trainer(
            model,
            arguments(tmp_path, fp16=precision == "fp16", bf16=precision == "bf16", max_steps=1),
            train_dataset=numbers(),
            optimizers=(make(model), None),
            callbacks=[MixedPrecisionCallback(config)],
        )

    refused = trainer({})
    before = parameters_of(refused)
    with pytest.raises(AttachError, match=r"inside of backward.*galore_adamw.*leave hf_amp out"):
        refused.train()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(refused), strict=True))
    trainer({"enabled": False}).train()


def test_hyperparameter_search(tmp_path: Path) -> None:
    """Trials with optuna: one session each, the objective is the loss alone, nothing of one is left in the next."""
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    sessions, logs = [], []

    class Collect(OverflowAt):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sessions.append((callback.session, callback.session.metrics()))
            logs.append(trainer.log)

    trainer = Trainer(
        None,
        arguments(tmp_path, max_steps=STEPS, eval_strategy="steps", eval_steps=STEPS),
        model_init=Regression,
        train_dataset=numbers(),
        eval_dataset=numbers(),
        callbacks=[callback, Collect(2)],
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=2, backend="optuna"
    )
    assert len({id(session) for session, _ in sessions}) == 2
    assert all((figures["applied_steps"], figures["skipped_steps"]) == (2, 1) for _, figures in sessions)
    kinds = [event.kind for event in sessions[0][0].events]
    assert kinds[-1] is EventKind.DETACHED
    assert 0 < best.objective < 1
    assert logs[-1].__wrapped__ == type(trainer).log.__get__(trainer)


class Large(Regression):
    """One whose hidden layer leaves FP16's range."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return super().forward(x * 1e6, labels)


def test_a_new_trainer_on_the_same_model(tmp_path: Path) -> None:
    """A cell of a notebook that is run again, also in FP32: what runs is what the newest session says, and back."""

    def trainer(folder: str, model: torch.nn.Module, **options: Any) -> tuple[Trainer, MixedPrecisionCallback]:
        set_seed(0)
        callback = MixedPrecisionCallback({"init_scale": 1.0})
        options = {"max_steps": STEPS, "learning_rate": 0.0, "train_sampling_strategy": "sequential", **options}
        given = arguments(tmp_path / folder, **options)
        return Trainer(model, given, train_dataset=numbers(), callbacks=[callback]), callback

    model = Large()
    first, callback = trainer("first", model)
    first.train()
    assert "hidden" in callback.session.plan.modules
    for name in ("again", "once more"):
        again, callback_again = trainer(name, model)
        again.train()
        assert callback_again.session.plan == callback.session.plan
        assert logged(again, "loss") == logged(first, "loss")
        assert callback_again.session.metrics()["skipped_steps"] == 1
    former = callback.session
    first.train()
    assert callback.session is not former
    assert callback.session.metrics()["skipped_steps"] == 1
    wide, _ = trainer("wide", model, fp16=False)
    wide.train()
    alone, _ = trainer("alone", copy.deepcopy(model), fp16=False)
    alone.train()
    assert logged(wide, "loss") == logged(alone, "loss") != logged(again, "loss")


def test_a_trial_that_failed_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """An exception ends one run; the next, on a new accelerator as in a search, logs under a session of its own."""

    class FailsOnce(TrainerCallback):
        failed = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.failed:
                self.failed = True
                raise RuntimeError("once")

    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = regression_trainer(tmp_path, callback, FailsOnce(), fp16=True, max_steps=STEPS)
    with pytest.raises(RuntimeError, match="once"):
        trainer.train()
    first = callback.session
    trainer.create_accelerator_and_postprocess()
    trainer.train()
    assert callback.session is not first
    assert len(first.sinks) == 1  # the console
    lines = [json.loads(line) for line in (tmp_path / "amp_events.jsonl").read_text().splitlines()]
    ended = [line for line in lines if line["event"] == "training_ended"]
    assert [line["run_id"] for line in ended] == [first.run_id, callback.session.run_id]
    assert [line["applied_steps"] for line in ended] == [1, STEPS]


class MemoryRunsOut(torch.autograd.Function):
    """Identity whose backward finds no memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")


class LargeWeightsAt(TrainerCallback):
    """In one step the weights of a layer are beyond FP16's range."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            model.hidden.weight.data.mul_(1e7)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self._step:
            model.hidden.weight.data.div_(1e7)


def hungry_in_fp32(callback: MixedPrecisionCallback, at: int) -> Callable[..., torch.Tensor]:
    """A loss whose backward finds no memory where a module runs in FP32, in the batch of that number after it went there."""
    seen: list[int] = []

    def loss_of(outputs: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        loss = (outputs["logits"] - labels).square().mean()
        seen.extend([1] if callback.session.plan.modules else [])
        return MemoryRunsOut.apply(loss) if len(seen) == at and callback.session.plan.modules else loss

    return loss_of


@pytest.mark.usefixtures("nothing_compiled")
def test_a_backward_that_finds_no_memory_under_a_new_plan(tmp_path: Path) -> None:
    """The batch is trained under the former plan, and every later one; no step but the overflowing one is lost."""
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = regression_trainer(
        tmp_path, callback, LargeWeightsAt(2), compute_loss_func=hungry_in_fp32(callback, 1), fp16=True, max_steps=STEPS
    )
    trainer.train()
    assert callback.session.metrics()["applied_steps"] == trainer.state.global_step - 1 == STEPS - 1
    assert not callback.session.plan.modules
    changes = [e.message for e in callback.session.events if e.kind is EventKind.PRECISION_CHANGED]
    assert [("FP32" in change, "not enough memory" in change) for change in changes] == [(True, False), (True, True)]
    callback.session.detach()
    assert "training_step" not in vars(trainer)


def test_gradients_of_other_batches_are_not_lost_for_it(tmp_path: Path) -> None:
    """In the second batch of a step the error is the user's."""
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = regression_trainer(
        tmp_path, callback, LargeWeightsAt(2), compute_loss_func=hungry_in_fp32(callback, 2), fp16=True,
        max_steps=STEPS, gradient_accumulation_steps=2,
    )  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


def test_auto_find_batch_size(tmp_path: Path) -> None:
    """Memory runs out in the second backward: the run begins anew with less, and the lost step counts for nothing."""
    seen: list[int] = []

    def hungry(outputs: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append(len(labels))
        loss = (outputs["logits"] - labels).square().mean()
        return MemoryRunsOut.apply(loss) if len(seen) == 2 else loss

    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = regression_trainer(
        tmp_path, callback, OverflowAt(3), compute_loss_func=hungry, fp16=True, max_steps=STEPS,
        auto_find_batch_size=True,
    )  # fmt: skip
    trainer.train()
    assert seen == [4, 4, 3, 3, 3]
    assert trainer.state.global_step == STEPS
    assert [e.step for e in callback.session.events if e.kind is EventKind.STEP_SKIPPED] == [3]
    assert callback.session.metrics()["applied_steps"] == 3  # one before the memory ran out
    assert callback.session.monitor.losses == 4


def test_lora(tmp_path: Path) -> None:
    """FP32 adapters on a frozen half-precision base: the adapters move, the base does not."""
    from peft import LoraConfig, get_peft_model

    set_seed(0)
    base = tiny_gpt2().half()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values()} == {torch.float16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=STEPS, save_strategy="steps", save_steps=3),
        train_dataset=text(),
        callbacks=[callback, OverflowAt(2)],
    )
    trained(trainer, callback)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("form", ["command line", "yaml"])
def test_options_through_hf_argument_parser(tmp_path: Path, form: str) -> None:
    """The config is a dataclass as HfArgumentParser wants it, from the command line and from YAML."""
    parser = HfArgumentParser((TrainingArguments, MixedPrecisionConfig))
    if form == "yaml":
        file = tmp_path / "run.yaml"
        file.write_text(
            f"output_dir: {tmp_path}\nfp16: true\nuse_cpu: true\nmax_steps: 2\nreport_to: none\n"
            "init_scale: 512.0\nscaling_strategy: adaptive\npatience: 7\nenable_monitoring: false\n"
        )
        options, config = parser.parse_yaml_file(str(file))
    else:
        line = f"--output_dir {tmp_path} --fp16 --use_cpu --max_steps 2 --report_to none --init_scale 512"
        line += " --scaling_strategy ADAPTIVE --patience 7 --no_enable_monitoring"
        options, config = parser.parse_args_into_dataclasses(line.split())
    assert config == MixedPrecisionConfig(
        init_scale=512.0, scaling_strategy=ScalingStrategy.ADAPTIVE, patience=7, enable_monitoring=False
    )
    callback = MixedPrecisionCallback(config)
    Trainer(Regression(), options, train_dataset=numbers(), callbacks=[callback]).train()
    assert callback.session.metrics()["applied_steps"] == 2
