"""A recipe: one YAML file, one reproducible story from a model and data to quantized files.

    model -> data -> preprocess -> steps (techniques and `train`, in order) -> export -> quantize

Every section is frozen and validated, unknown keys are errors. What a technique or a quantizing
scheme takes is that plugin's own `Config`, looked up by name in the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from vitedge import plugins
from vitedge.errors import FileProblems, UsageError, closest
from vitedge.preprocess import Preprocessing
from vitedge.schema import Section, load_yaml, resolve_file, validate


def _left_to_data(key: str) -> UsageError:
    return UsageError(
        key,
        expected="numbers",
        found="null, which training fills in from its data",
        fix="name the recipe.yaml of the build folder instead, or give a data set",
    )


class ModelSpec(Section):
    """Any timm ViT or DeiT, at any image and patch size; or any other timm classifier, to teach one."""

    arch: str = Field("deit_tiny_patch16_224", description="timm's model name")
    img_size: int | None = Field(224, ge=8, le=1024, description="side of the square input, pixels; null: that of the data's images")
    patch_size: int | None = Field(None, ge=1, le=64, description="side of a patch, pixels; null keeps the architecture's")
    stem: Literal["own", "small", "small_pooled"] = Field(
        "own",
        description="for images of about 32 px, a ResNet may start with a 3x3 convolution of stride 1: small_pooled keeps the pooling "
        "after it, small has none and sees four times the pixels",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of timm.create_model")
    weights: str = Field("pretrained", description="builtin | pretrained | none | path of a .safetensors or state-dict file")

    @model_validator(mode="after")
    def _patches_fit(self) -> ModelSpec:
        if self.patch_size and self.img_size and self.img_size % self.patch_size:
            raise ValueError(f"img_size to be a multiple of patch_size {self.patch_size}")
        return self

    @property
    def side(self) -> int:
        """Side of the input, pixels.

        Raises:
            UsageError: It is left to the data, and not filled in yet.
        """
        if self.img_size is None:
            raise _left_to_data("model.img_size")
        return self.img_size


class DataSpec(Section):
    """Which images, and how they are split; test images are never trained, tuned or calibrated on."""

    name: str = Field("cifar10", description="cifar10 | cifar100 | path of an image folder or an archive of one")
    validation: float = Field(0.1, gt=0, lt=0.9, description="share of train split off for tuning where the data has no split of its own")
    split_seed: int = Field(0, description="seed of that split")


class PreprocessSpec(Section):
    """The contract's free fields; the size is the model's."""

    crop: Literal["squash", "center"] = "squash"
    crop_fraction: float = Field(1.0, gt=0, le=1)
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] | None = Field((0.485, 0.456, 0.406), description="ImageNet's; null: that of the data's train split")
    std: tuple[float, float, float] | None = Field((0.229, 0.224, 0.225), description="as mean")

    def contract(self, size: int) -> Preprocessing:
        """The preprocessing contract at a model's input size.

        Raises:
            UsageError: Mean or deviation are left to the data, and not filled in yet.
        """
        if self.mean is None or self.std is None:
            raise _left_to_data("preprocess.mean and preprocess.std")
        return Preprocessing(size=size, **self.model_dump())


class TrainConfig(Section):
    """One run of the training loop: linear warm-up, then cosine decay to zero."""

    epochs: float = Field(3, gt=0, description="passes over the training images; may be fractional")
    steps: int | None = Field(None, ge=1, description="optimizer steps; wins over epochs")
    batch_size: int = Field(64, ge=1, description="images of one optimizer step, over all processes")
    accumulate: int = Field(
        1, ge=1, description="parts a process takes its share of a batch in, to spare memory; batch norms see a part at a time"
    )
    optimizer: Literal["adamw", "sgd", "muon"] = Field(
        "adamw",
        description="sgd: Nesterov momentum 0.9; muon: orthogonalized momentum for matrices, AdamW for the rest, with AdamW's rates",
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: float = Field(0.05, ge=0, description="not applied to norms, biases and embeddings")
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate of a block relative to the block after it")
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    clip_grad: float | None = Field(1.0, gt=0, description="largest gradient norm; null for none")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the moving average of weights, which is what is evaluated and kept")
    flip: bool = Field(True, description="random horizontal flips")
    shift: int = Field(
        4, ge=0, description="random shifts of up to so many pixels, of the stored image where all are square and of one size"
    )
    randaugment: int = Field(0, ge=0, le=8, description="operations of RandAugment per image; 0 for none")
    randaugment_magnitude: int = Field(9, ge=0, le=30, description="strength of those operations, of 30")
    erase: float = Field(0.0, ge=0, le=1, description="probability of erasing a random rectangle of an image")
    mixup: float = Field(0.0, ge=0, description="alpha of Mixup; 0 for none")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix; 0 for none. With both, each group of images takes one of them")
    views: int = Field(
        0, ge=0, description="augmented views per image, repeated in turn, so that a teacher judges each once; 0: always new"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth rate")
    patch_drop: float = Field(0.0, ge=0, lt=1, description="share of the patch tokens dropped at random from each training image")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="autocast type of the forward pass")
    compile: bool = Field(False, description="torch.compile the model; needs a C++ compiler on a CPU")
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations on the validation split; 0 for ten in the run")
    patience: int = Field(0, ge=0, description="evaluations without a better top-1 before the run ends early; 0 for never")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints that a killed run resumes from")

    @model_validator(mode="after")
    def _views_are_fixed(self) -> TrainConfig:
        if self.views and (self.mixup or self.cutmix):
            raise ValueError("views: 0 beside mixup or cutmix, whose mixtures are never the same twice")
        return self


class ExportConfig(Section):
    """How the model becomes ONNX, and what the file must agree with PyTorch on."""

    opset: int = Field(18, ge=17, le=23, description="17 and above have LayerNormalization as one operator")
    parity_images: int = Field(64, ge=1, description="real images the exported file is checked on")
    max_abs_err: float = Field(1e-3, gt=0, description="largest difference of a logit from PyTorch's")
    agree_in: tuple[Literal["onnxruntime", "openvino"], ...] = Field(
        ("onnxruntime", "openvino"),
        min_length=1,
        description="runtimes in which a technique's quantized file must give PyTorch's class on 99 % of images; of others it is noted",
    )


class CalibrationConfig(Section):
    """Images that activation ranges are read from; always of the train split."""

    images: int = Field(256, ge=1)
    seed: int = 0
    batch_size: int = Field(8, ge=1, description="small, so that calibration never holds all activations")


class Scheme(Section):
    """Base of a quantizing scheme's own settings."""


class GuardConfig(Section):
    """How much top-1 a quantized file may lose on validation images before layers are left in float, the most sensitive first."""

    max_top1_drop: float = Field(0.3, ge=0, le=100, description="top-1 points below the fp32 model on the same validation images")
    minutes: float = Field(10, ge=0, description="time for each file; the first is built and judged in any case")
    images: int | None = Field(None, ge=1, description="validation images to judge on; null: all of them")


class QuantizeConfig(Section):
    """Which int8 files are built. A scheme is written `library.scheme: {settings}`."""

    calibration: CalibrationConfig = CalibrationConfig()
    schemes: tuple[tuple[str, SerializeAsAny[Scheme]], ...] = ()
    guard: GuardConfig | None = Field(
        None, description="leave layers of these files in float until they lose little enough; null: no layers"
    )

    @model_validator(mode="after")
    def _something_to_guard(self) -> QuantizeConfig:
        if self.guard and not any("exclude" in type(config).model_fields for _, config in self.schemes):
            raise ValueError("a scheme that can leave layers in float (one with `exclude`) beside guard")
        return self


class Limits(Section):
    """What an artifact must keep to be shipped."""

    max_top1_drop: float = Field(0.5, ge=0, description="top-1 points below the fp32 model on the same images")


class Recipe(Section):
    """The whole file. `name` is the file's stem and the name of the folder built."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    seed: int = Field(0, ge=0, description="of everything random in training")
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    preprocess: PreprocessSpec = PreprocessSpec()
    steps: tuple[tuple[str, SerializeAsAny[Section]], ...] = ()
    export: ExportConfig = ExportConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    limits: Limits = Limits()

    @property
    def trains(self) -> bool:
        """Whether there is a `train` step."""
        return any(isinstance(config, TrainConfig) for _, config in self.steps)

    @property
    def ends_in_training(self) -> bool:
        """Whether nothing is done to the model after its last `train` step."""
        return bool(self.steps) and isinstance(self.steps[-1][1], TrainConfig)

    def contract(self) -> Preprocessing:
        """The preprocessing contract every stage of this recipe uses."""
        return self.preprocess.contract(self.model.side)

    def to_plain(self) -> dict[str, Any]:
        """Plain data that `load` reads back to an equal recipe."""
        plain = self.model_dump(mode="json")
        plain["steps"] = [{name: config} for name, config in plain["steps"]]
        plain["quantize"]["schemes"] = [{name: config} for name, config in plain["quantize"]["schemes"]]
        return plain


def _step_config(name: str) -> type[Section]:
    if name == "train":
        return TrainConfig
    techniques = plugins.names("compress")
    if name not in techniques:
        known = ["train", *techniques]
        raise UsageError(name, expected=f"one of {', '.join(known)}", found=f"'{name}'{closest(name, known)}", fix="rename it")
    config: type[Section] = plugins.load("compress", name).Config
    return config


def _scheme_config(name: str) -> type[Section]:
    library, _, scheme = name.partition(".")
    schemes: dict[str, type[Section]] = plugins.load("quantize", library).SCHEMES
    if scheme not in schemes:
        known = [f"{library}.{known}" for known in schemes]
        raise UsageError(name, expected=f"one of {', '.join(known)}", found=f"'{name}'{closest(name, known)}", fix="rename it")
    return schemes[scheme]


def _build_entries(entries: Any, key: str, config_of: Callable[[str], type[Section]], where: str, problems: list[UsageError]) -> list[Any]:
    """`[{name: settings}]` to `[(name, validated settings)]`; what is wrong is added to `problems`."""
    built: list[Any] = []
    if not isinstance(entries, (list, tuple)):
        problems.append(
            UsageError(f"{where}: {key}", expected="a list of `- name: {settings}`", found=repr(entries)[:60], fix="write a list")
        )
        return built
    for index, entry in enumerate(entries):
        entry = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or len(entry) != 1:
            problems.append(
                UsageError(
                    f"{where}: {key}.{index}", expected="one `- name: {settings}`", found=repr(entry)[:60], fix="split or mend the entry"
                )
            )
            continue
        ((name, settings),) = entry.items()
        try:
            given = {} if settings is None else settings  # not what is empty in another way: `tome: off` is false, and no default
            built.append((str(name), validate(config_of(str(name)), given, where, prefix=f"{key}.{index}.{name}.")))
        except FileProblems as error:
            problems.extend(error.problems)
        except UsageError as error:
            problems.append(UsageError(f"{where}: {key}.{index}", expected=error.expected, found=error.found, fix=error.fix))
    return built


def load_recipe(name_or_path: str) -> Recipe:
    """Read, validate and resolve a recipe by name or path.

    Raises:
        UsageError: Not found or not YAML.
        FileProblems: Every problem of the file, a line each.
    """
    path = resolve_file("recipes", name_or_path)
    return recipe_from_plain({"name": path.stem, **load_yaml(path)}, str(path))


def recipe_from_plain(content: dict[str, Any], where: str) -> Recipe:
    """Validate plain data as a recipe; `where` is the file that errors name.

    Raises:
        FileProblems: Every problem, a line each.
    """
    problems: list[UsageError] = []
    content = dict(content)
    content["steps"] = _build_entries(content.get("steps") or [], "steps", _step_config, where, problems)
    quantize = content.get("quantize") or {}
    if isinstance(quantize, dict):
        schemes = _build_entries(quantize.get("schemes") or [], "quantize.schemes", _scheme_config, where, problems)
        content["quantize"] = {**quantize, "schemes": schemes}
    try:
        recipe = validate(Recipe, content, where)
    except FileProblems as error:
        problems.extend(error.problems)
    if problems:
        raise FileProblems(where, problems)
    return recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors; every plugin's settings included."""
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})

    def entries(configs: dict[str, type[Section]]) -> dict[str, Any]:
        options = []
        for name, config in configs.items():
            inner = config.model_json_schema()
            definitions.update(inner.pop("$defs", {}))
            options.append({"type": "object", "properties": {name: inner}, "required": [name], "additionalProperties": False})
        return {"type": "array", "items": {"oneOf": options}}

    schema["properties"]["steps"] = entries({name: _step_config(name) for name in ["train", *plugins.names("compress")]})
    scheme_names = [f"{library}.{s}" for library in plugins.names("quantize") for s in plugins.load("quantize", library).SCHEMES]
    definitions["QuantizeConfig"]["properties"]["schemes"] = entries({name: _scheme_config(name) for name in scheme_names})
    schema["required"] = []
    return schema
