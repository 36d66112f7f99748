"""Names that other programs have for keys of the configuration; a message about an unknown key names Tritrain's."""

_NAMES = {
    "run.name": "run_name experiment_name exp_name",
    "run.folder": "output_dir out_dir save_dir log_dir",
    "run.seed": "random_seed",
    "model.num_layers": "num_hidden_layers n_layer n_layers num_blocks depth",
    "model.hidden_size": "n_embd d_model dim embed_dim hidden_dim",
    "model.intermediate_size": "ffn_dim d_ff ffn_hidden_size n_inner mlp_hidden_size",
    "model.num_heads": "num_attention_heads n_head n_heads",
    "model.num_kv_heads": "num_key_value_heads n_kv_heads num_query_groups",
    "model.max_sequence_length": "max_position_embeddings context_length n_positions n_ctx",
    "model.activation": "hidden_act activation_function",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon",
    "model.tie_embeddings": "tie_word_embeddings weight_tying",
    "model.init_std": "initializer_range init_scale",
    "data.sources": "dataset datasets dataset_path data_path train_data train_files",
    "data.sequence_length": "seq_len seq_length max_seq_len max_seq_length max_length block_size",
    "data.workers": "num_workers dataloader_num_workers",
    "training.global_batch_sequences": "batch_size global_batch_size train_batch_size grad_accum grad_accumulation "
    "grad_accumulation_steps gradient_accumulation gradient_accumulation_steps accumulate_grad_batches",
    "training.micro_batch_sequences": "micro_batch_size micro_batch device_batch_size per_device_train_batch_size "
    "train_micro_batch_size_per_gpu local_batch_size",
    "training.total_steps": "max_steps num_steps train_steps training_steps num_train_steps max_iters num_iterations",
    "training.total_tokens": "max_tokens num_tokens train_tokens",
    "training.compute_dtype": "dtype torch_dtype bf16 fp16 amp mixed_precision param_dtype",
    "training.activation_checkpointing": "gradient_checkpointing activation_checkpoint recompute",
    "training.compile": "torch_compile",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr",
    "optimizer.weight_decay": "wd",
    "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.eps": "epsilon adam_epsilon adam_eps",
    "optimizer.max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clipping gradient_clip_val max_norm",
    "schedule.shape": "lr_scheduler lr_scheduler_type scheduler lr_schedule lr_decay_style",
    "schedule.warmup_steps": "warmup warmup_iters warmup_ratio num_warmup_steps lr_warmup_steps",
    "schedule.final_fraction": "min_lr min_lr_ratio final_lr",
    "engine.name": "strategy backend fsdp",
    "engine.zero_stage": "zero stage",
    "checkpoint.interval_steps": "save_steps save_interval save_every checkpoint_interval ckpt_interval",
    "checkpoint.keep_last": "save_total_limit keep_last_n",
    "checkpoint.start_from": "init_from pretrained load_checkpoint resume_from_checkpoint resume_from",
    "logging.interval_steps": "logging_steps log_interval log_every log_every_n_steps",
    "logging.tensorboard": "wandb report_to use_wandb wandb_project",
    "evaluation.interval_steps": "eval_steps eval_interval eval_every val_check_interval",
}

ALIASES = {alias: key for key, aliases in _NAMES.items() for alias in aliases.split()}
"""The key for each name, in lower case."""
