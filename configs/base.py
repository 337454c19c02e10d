"""Every field, with its default. Experiment files start from here and edit.

A field is overridden on the command line as --config.group.field=value. The
meaning, unit and allowed values of each are in `mor/config.py`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0  # parameters and every random choice of the run

  config.model = ml_collections.ConfigDict(dict(
      vocab_size=4096,
      d_model=192,
      num_heads=6,
      num_kv_heads=2,
      head_dim=32,
      d_ff=512,
      num_layers=8,  # unrolled, prelude and coda included
      sharing="middle_cycle",  # vanilla, cycle, sequence, middle_cycle, middle_sequence
      num_recursions=3,  # R
      kv_plan="recursion_wise",  # recursion_wise, shared, hybrid
      execution="gathered",  # gathered (saves FLOPs) or masked (reference)
      attention="auto",  # xla, splash (TPU), cudnn (GPU); auto is the device's
      rope_theta=10000.0,
      norm_eps=1e-5,
      init_std=0.02,
      tie_embeddings=True,  # the output head is the embedding
      cross_documents=False,  # True: packed documents attend to each other
      compute_dtype="float32",  # or bfloat16; parameters stay float32
      remat="none",  # none, dots, full
      scan_layers=True,
  ))
  config.model.rope_scaling = ml_collections.ConfigDict(dict(  # Llama 3's; factor 1 is off
      factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192))
  config.model.lora = ml_collections.ConfigDict(dict(  # rank of each step's delta; 0 is off
      q=0, k=0, v=0, o=0, gate=0, up=0, down=0))
  config.model.router = ml_collections.ConfigDict(dict(
      name="expert_choice",  # fixed, expert_choice, token_choice
      arch="linear",  # linear, mlp, wide_mlp, random
      activation="sigmoid",  # sigmoid, tanh, none; token_choice: softmax, sigmoid
      alpha=0.1,  # factor on the activated score
      temperature=1.0,
      capacity=(),  # fraction of the sequence per step; () is (R-r)/R
      capacity_warmup_steps=0,  # cosine from 1 to `capacity`; 0 is off
      gating="weighted",  # weighted, additive; token_choice: also every_step
      sampling="aux_loss",  # aux_loss, aux_router, none
      sampling_coef=0.001,
      aux_router_lr_multiplier=10.0,
      z_loss_coef=0.0,
      balancing="none",  # token_choice: none, loss, loss_free
      balance_coef=0.1,
      bias_update_rate=0.001,
      balance_warmup_steps=0,
  ))
  config.data = ml_collections.ConfigDict(dict(
      source="sotu",  # sotu, tfds:NAME, hf:DIR, or a path or glob
      validation_source="",  # "" holds out validation_fraction of the documents
      text_key="text",
      validation_fraction=0.05,
      max_bytes=0,  # training text to read; 0 is all
      tokenizer="bpe:4096",  # bytes, bpe:SIZE, or a tokenizers .json
      seq_len=256,  # tokens
      batch_size=8,  # rows of the global batch
      shuffle_seed=0,
      cache_dir="",  # "" is the user's cache directory
  ))
  config.optim = ml_collections.ConfigDict(dict(
      learning_rate=3e-3,
      schedule="wsd",  # wsd, cosine, constant
      warmup_steps=20,
      cooldown_fraction=0.2,
      end_ratio=0.0,
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.1,
      clip_norm=1.0,  # 0 is off
  ))
  config.train = ml_collections.ConfigDict(dict(
      steps=500,
      accumulation=1,  # micro-batches a step
      loss_block=2048,  # tokens whose logits exist at once
      log_every=10,  # steps
      eval_every=250,  # steps
      eval_rows=64,  # 0 is all
      checkpoint_every=250,  # steps
      keep_checkpoints=2,  # newest; where one is damaged, the run goes on from the one before
      keep_every=0,  # steps; such checkpoints are kept for ever; 0 is none
      step_timeout=0.0,  # seconds; a step that takes longer ends the process with status 76; 0 is off
      sample_prompt="The state of the Union is",
      sample_tokens=64,
  ))
  config.init = ml_collections.ConfigDict(dict(  # of a pretrained model, by --mode=convert
      method="stepwise",  # stepwise, average, lower, upper, random
      lora="svd",  # svd, zero
  ))
  config.distill = ml_collections.ConfigDict(dict(
      teacher="",  # workdir of the run that teaches; "" is off
      weight=0.5,
      temperature=1.0,
  ))
  config.exit = ml_collections.ConfigDict(dict(  # early exits
      layers=(),  # after which there is one: of a recursive model the ends of its loops; () is off
      weighting="constant",  # constant (end 1, exits coef), depth
      coef=0.1,
      kl=1.0,  # share of an exit's loss that is learnt from the end's logits
      hidden="none",  # none, last, uniform, dynamic
      hidden_coef=0.5,
      layer_dropout=0.0,  # of the last layer
      curriculum="none",  # none, rotational, gradual
  ))
  config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1, sequence=1))
  config.lock()
  return config
