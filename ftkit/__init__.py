"Fine-tune large language models. Names are imported when first used, so `import ftkit` is quick."
import importlib, sys, types

__version__ = "0.1.0"

_ROOMS = {  # module → the names of its that stand on the public face
    "core": "FtkitError unknown_name pick_device pick_dtype seed_everything",
    "nano.colors": "color_rows parse_color ciede2000 score_colors baselines swatches",
    "nano.base": "nano_path nano_config",
    "quant.qtensor": "QTensor quantize",
    "quant.linear": "QLinear QExperts quantize_model dequantize_model",
    "lora.layers": "LoraLinear",
    "lora.dora": "DoraLinear",
    "lora.experts": "LoraExperts",
    "lora.modules": "token_ids",
    "lora.inject": "LoraConfig add_lora lora_layers trained_modules adapted find_targets "
                   "lora_disabled count_parameters merge_lora unmerge_lora unload_lora",
    "lora.settings": "adapter_config",
    "lora.io": "save_adapter load_adapter",
    "data.messages": "Message ToolCall Conversation as_messages",
    "data.templates": "Template Rendered",
    "data.families": "template template_names",
    "data.files": "Rows Source source read_rows media_path",
    "data.layouts": "Layout",
    "data.formats": "layouts find_layout as_layout converter to_messages",
    "data.tokens": "Encoded EncodedBatch IGNORE",
    "data.encode": "EncodeReport encode encode_prompt encode_all encode_stream encode_batches",
    "data.packing": "pack fill make_rows collate",
    "data.preview": "preview",
    "data.store": "TokenStore open_store cache_folder clear_cache",
    "data.mixture": "Mixture LazyRows",
    "data.dataset": "DataConfig TuningData load_data",
    "data.check": "DataReport check_data",
    "data.pairs": "Preference Feedback to_pairs to_feedback to_prompts",
    "models.stream": "save_original",
    "models.load": "ModelConfig resolve load_model load_tokenizer load_template save_model",
    "generate": "generate Chat load_chat chat",
    "training.optim": "OptimConfig build_optimizer build_schedule",
    "training.plan": "TrainConfig Objective",
    "training.run": "Callback JsonlLog SaveCheckpoints StopOnSignal Interrupted Run read_log",
    "training.checkpoint": "latest_checkpoint load_checkpoint",
    "training.loop": "Trainer",
    "training.callbacks": "Progress Trackers SampleChats AnswerMetric split_answer",
    "models.shapes": "shape_names",
    "activations": "MemorySetting",
    "memory": "Ledger cap_memory predict_memory recipe_setting",
    "sft": "SupervisedTuning PreTraining",
    "kept": "Saving",
    "fast": "speed_up slow_down is_fast why_not",
    "graph": "StepGraphs",
    "flops": "step_flops",
    "profiling": "where_time_goes",
    "peaks": "Peak",
    "planner": "FitMemory MemoryPlan plan_ahead plan_memory",
    "evaluate": "Scores metric compare",
    "convert": "merge pth_to_hf",
    "zoo.models": "BaseModel",
    "zoo.names": "list_recipes",
    "recipes": "Recipe recipe copy_recipe load_recipe train test",
    "bench": "BenchResult bench",
    "cli": "log_dataset check_custom_dataset list_dataset_format",
}
_HOME = {name: f"ftkit.{module}" for module,names in _ROOMS.items() for name in names.split()}
__all__ = sorted(_HOME)


class _Face(types.ModuleType):
    "The package itself; where a module and a function share a name, the function wins."
    def __setattr__(self, name, value):
        # `from ftkit.generate import …` still works
        if name in _HOME and isinstance(value, types.ModuleType): return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'ftkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__(): return sorted([*globals(), *_HOME])
