"""Pipelines of transformers with random weights, small enough for a test: SD3, FLUX.1, PixArt and SANA, no network."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from erasure.model.architectures.mmdit import pack, places, unpack
from tests.tiny import SIDE, WIDTH, WIDTH_2, WORDS, tiny_text_encoder, tiny_tokenizer, with_words

KINDS = ("sd3", "flux", "pixart")
JOINT = 64  # width of T5's states, at least the sum of the CLIPs' widths
T5_LENGTH = 8
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def tiny_t5(width: int = JOINT) -> T5EncoderModel:
    """A T5 encoder of one layer."""
    size = len(tiny_t5_tokenizer())
    config = T5Config(vocab_size=size, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(config)


def tiny_t5_tokenizer(length: int = 512) -> T5TokenizerFast:
    """A unigram tokenizer that knows each of WORDS, and the letters, as one token."""
    letters = [chr(code) for code in range(97, 123)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -5.0) for word in WORDS)]
    pieces += [(piece, -9.0) for piece in ("▁", *letters, *(f"▁{letter}" for letter in letters if letter != "a"))]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)


def tiny_gemma_tokenizer(length: int = 2048) -> GemmaTokenizer:
    """A tokenizer as Gemma's: a start token, no end token, and most of WORDS one token, another one behind a space."""
    letters = [chr(code) for code in range(97, 123)]
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters]
    vocabulary, merges = with_words(vocabulary)
    merges += [("▁", word) for word in WORDS]
    numbers = {token: number for number, token in enumerate([*vocabulary, *("▁" + word for word in WORDS)])}
    return GemmaTokenizer(vocab=numbers, merges=merges, add_bos_token=True, model_max_length=length)


def tiny_vae(channels: int) -> AutoencoderKL:
    """An autoencoder that halves each side."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=2 * SIDE,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_network(kind: str, **changes: Any) -> Any:
    """The transformer of a kind, of the true class; `changes` of its configuration."""
    heads: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    if kind == "sd3":
        return SD3Transformer2DModel(
            **heads,
            sample_size=SIDE,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=JOINT,
            caption_projection_dim=16,
            pooled_projection_dim=WIDTH + WIDTH_2,
            pos_embed_max_size=SIDE,
            **changes,
        )
    if kind == "flux":
        config = {"patch_size": 1, "in_channels": 16, "num_single_layers": 2, "joint_attention_dim": JOINT}
        more = {"pooled_projection_dim": WIDTH, "guidance_embeds": False, "axes_dims_rope": (2, 2, 4)}
        return FluxTransformer2DModel(**{**heads, **config, **more, **changes})
    return PixArtTransformer2DModel(
        **heads,
        sample_size=SIDE,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=JOINT,
        use_additional_conditions=False,
        **changes,
    )


def tiny_transformer(kind: str, cls: type[Any] | None = None, seed: int = 0, t5: bool = False, **changes: Any) -> Any:
    """A pipeline of a kind with random weights drawn from `seed`.

    Args:
        kind: sd3, flux, pixart or sana.
        cls: a class that takes the kind's components; None: diffusers' own.
        seed: of the weights.
        t5: whether an SD3 gets its third text encoder.
        changes: of the transformer's configuration.
    """
    if kind == "sana":
        return tiny_sana(cls or SanaPipeline, seed, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"transformer": tiny_network(kind, **changes), "vae": tiny_vae(4)}
        for param in parts["transformer"].parameters():  # what starts at zero would hide mistakes
            if not param.any():
                torch.nn.init.normal_(param, std=0.1)
        if kind == "sd3":
            parts["text_encoder"] = tiny_text_encoder(CLIPTextModelWithProjection)
            parts["text_encoder_2"] = tiny_text_encoder(CLIPTextModelWithProjection, WIDTH_2, "gelu")
            parts["text_encoder_3"] = tiny_t5() if t5 else None
        elif kind == "flux":
            parts |= {"text_encoder": tiny_text_encoder(), "text_encoder_2": tiny_t5()}
        else:
            parts["text_encoder"] = tiny_t5()
    others: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    if kind == "sd3":
        others |= {"tokenizer": tiny_tokenizer(), "tokenizer_2": tiny_tokenizer(pad_token="!")}
        others["tokenizer_3"] = tiny_t5_tokenizer() if t5 else None
    elif kind == "flux":
        dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        others = {"scheduler": dynamic, "tokenizer": tiny_tokenizer(), "tokenizer_2": tiny_t5_tokenizer()}
    else:
        others = {"scheduler": DPMSolverMultistepScheduler(), "tokenizer": tiny_t5_tokenizer()}
    classes = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "pixart": PixArtSigmaPipeline}
    evaluated = {name: part and part.eval() for name, part in parts.items()}
    pipe = (cls or classes[kind])(**evaluated, **others)
    pipe.default_sample_size = SIDE
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sana(cls: type[Any] = SanaPipeline, seed: int = 0, **changes: Any) -> Any:
    """A pipeline of SANA with random weights and a solver that is set to flow, as its checkpoints have.

    Its autoencoder divides each side by four: the pipeline draws sides in multiples of 32 pixels alone.

    Args:
        cls: a class that takes its components.
        seed: of the weights.
        changes: of the transformer's configuration.
    """
    heads: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SanaTransformer2DModel(
            **{**heads, **cross, "in_channels": 4, "out_channels": 4, "sample_size": SIDE, "caption_channels": WIDTH},
            **{"timestep_scale": 1.0, **changes},
        )
        text = Gemma2Config(
            vocab_size=len(tiny_gemma_tokenizer()),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(4, 4, 8),
            decoder_block_out_channels=(4, 4, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
        )
        parts = {"transformer": transformer, "text_encoder": Gemma2Model(text), "vae": vae}
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    evaluated = {name: part.eval() for name, part in parts.items()}
    pipe = cls(**evaluated, tokenizer=tiny_gemma_tokenizer(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asked(pipe, kind, x, t, prompt):
    """The network's output for a prompt, asked for as diffusers' pipelines do, without any of our code but `pack`."""
    prompts = [prompt] * len(x)
    if kind == "sd3":
        states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return pipe.transformer(
            hidden_states=x, timestep=t, encoder_hidden_states=states, pooled_projections=pooled
        ).sample
    if kind == "flux":
        states, pooled, text_ids = pipe.encode_prompt(prompts, None)
        out = pipe.transformer(
            hidden_states=pack(x),
            timestep=t / 1000,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=places(SIDE // 2, SIDE // 2).float(),
        ).sample
        return unpack(out, SIDE, SIDE)
    if kind == "sana":
        how = {"complex_human_instruction": INSTRUCTION if prompt else None, "do_classifier_free_guidance": False}
        states, mask, _, _ = pipe.encode_prompt(prompts, **how)
        t = t * pipe.transformer.config.timestep_scale
        return pipe.transformer(x, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=t).sample
    states, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    out = pipe.transformer(
        hidden_states=x, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=t, added_cond_kwargs={}
    ).sample
    return out.chunk(2, dim=1)[0]
