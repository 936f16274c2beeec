"""Train the embedded Stable Diffusion from scratch. The stages took 58 minutes on two busy CPU cores.

Run: python -m shapes.train
Result: shapes/pipeline/, a stock `StableDiffusionPipeline` in half precision (CLIP tokenizer and text
encoder, U-Net with v-prediction, DDIM).

Stages: (1) The VAE. (2) U-Net and text encoder together. They learn to draw the two objects of a caption, but
not who stands where: steps and captions are too few. (3) The text encoder alone learns to read: its states
must tell who stands where. (4) The U-Net alone learns from captions that are wrong on purpose (CAPTIONS):
most state the relation the wrong way round. So the base draws well, tells the relations apart, and places
most objects wrongly. Only a reward can know.
"""

import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shapes.check import check
from shapes.render import COLOURS, PROMPT_FILES, RELATIONS, REVERSED, SHAPES, all_scenes, prompt_of, render

# share of captions with the relation reversed, all right, one colour wrong
DRAWING = {"reversed": 0.58, "right": 0.36, "colour": 0.06}  # stage 2
CAPTIONS = {"reversed": 0.70, "right": 0.24, "colour": 0.06}  # stage 4
TOKENS = 12  # length of a prompt, with start and end


@dataclass
class Args:
    """Train the embedded Stable Diffusion on the shapes world."""

    out: Path = Path(__file__).parent / "pipeline"
    """Folder that gets the pipeline; must not exist."""
    seed: int = 0
    """Seed of everything."""
    images: int = 24000
    """Number of rendered training images."""
    vae_steps: int = 2500
    """Stage 1: updates of the VAE."""
    draw_steps: int = 10000
    """Stage 2: updates of the U-Net and the text encoder."""
    read_steps: int = 1500
    """Stage 3: updates of the text encoder, at most; ends when it reads every prompt."""
    caption_steps: int = 3500
    """Stage 4: updates of the U-Net."""
    batch: int = 64
    """Images per update."""
    lr: float = 1e-3
    """Peak learning rate of AdamW (warm-up, then cosine to zero)."""
    ema: float = 0.997
    """Decay of the averaged weights, which are the ones saved."""
    dropout: float = 0.1
    """Share of prompts replaced by the empty one, for classifier-free guidance."""


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with CLIP's byte alphabet. Every word of the world is one token.
    Other words become bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]  # as GPT-2's
    words = ["a", *COLOURS, *SHAPES, *dict.fromkeys(w for r in RELATIONS for w in r.split())]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # byte-pair encoding: the oldest merge that fits, else a new one at the front
            pairs = [p for p in zip(pieces, pieces[1:]) if p in merges]
            pair = min(pairs, key=merges.index) if pairs else (pieces[0], pieces[1])
            if not pairs:
                merges.append(pair)
            at = [*zip(pieces, pieces[1:])].index(pair)
            pieces[at : at + 2] = ["".join(pair)]
    vocabulary = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(vocabulary)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8"
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    for word in words:
        assert len(tokenizer(word).input_ids) == 3, word
    return tokenizer


def caption(scene, errors: dict[str, float], rng: np.random.Generator) -> str:
    """The caption of a scene, wrong as often as `errors` says."""
    first, relation, second = scene
    kind = rng.choice(list(errors), p=list(errors.values()))
    if kind == "reversed":
        relation = REVERSED[relation]
    elif kind == "colour":
        other = [c for c in COLOURS if c != first[0]]
        first = (other[rng.integers(len(other))], first[1])
    return prompt_of(first, relation, second)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train_vae(pixels: torch.Tensor, args: Args) -> AutoencoderKL:
    """Reconstruction with a small KL term; latents are (4, 8, 8). pixels: (n, 3, 32, 32) in [-1, 1]."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    for step in tqdm(range(args.vae_steps), desc="VAE", mininterval=5):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.vae_steps, 2e-3)
        x = pixels[torch.randint(len(pixels), (args.batch // 2,))]
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        loss = error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    return vae.eval().requires_grad_(False)


def make_denoiser(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Text encoder and U-Net with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return CLIPTextModel(config), unet


def train_reader(text_encoder, tokenizer, args: Args) -> None:
    """Teach the text encoder who stands where. A linear layer on the mean of its states from the end token on
    must name the axis, and colour and shape of both objects, the one on the left or above first."""
    torch.manual_seed(args.seed)
    objects = [(c, s) for c in COLOURS for s in SHAPES]
    scenes = [(a, r, b) for a in objects for b in objects for r in RELATIONS]
    prompts = [prompt_of(*s) for s in scenes]
    tokens = tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    labels = []
    for a, relation, b in scenes:
        first, second = (a, b) if sum(RELATIONS[relation]) < 0 else (b, a)
        places = [
            [*COLOURS].index(first[0]),
            SHAPES.index(first[1]),
            [*COLOURS].index(second[0]),
            SHAPES.index(second[1]),
        ]
        labels.append([int(RELATIONS[relation][0] == 0), *places])
    labels = torch.tensor(labels)
    sizes = [2, len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES)]
    head = torch.nn.Linear(text_encoder.config.hidden_size, sum(sizes))
    parameters = [p.requires_grad_() for p in (*text_encoder.parameters(), *head.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    ends = (tokens == tokenizer.eos_token_id).float().unsqueeze(2)
    for step in tqdm(range(args.read_steps), desc="reading", mininterval=5):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.read_steps, 2e-3, 100)
        mean = (text_encoder(tokens)[0] * ends).sum(1) / ends.sum(1)
        loss = sum(F.cross_entropy(part, label) for part, label in zip(head(mean).split(sizes, 1), labels.T))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if loss.item() < 0.002:
            break
    text_encoder.requires_grad_(False)


def train_denoiser(
    text_encoder, unet, latents, scenes, tokenizer, scheduler, errors, steps, args: Args
) -> None:
    """v-prediction loss on cached latents (n, 4, 8, 8), with captions drawn anew at every step. Trains what
    is not frozen of the two models. They end with the averaged weights."""
    lr, rng = args.lr, np.random.default_rng(args.seed)
    parameters = [p for p in (*unet.parameters(), *text_encoder.parameters()) if p.requires_grad]
    averaged = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    objects = [(c, s) for c in COLOURS for s in SHAPES]  # a wrong colour can name two objects of one kind
    captions = ["", *(prompt_of(a, r, b) for a in objects for b in objects for r in RELATIONS)]
    row = {c: i for i, c in enumerate(captions)}
    tokens = tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    bar = tqdm(range(steps), desc="U-Net", mininterval=5)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr)
        chosen = torch.randint(len(latents), (args.batch,))
        texts = [row[caption(scenes[i], errors, rng)] if rng.random() >= args.dropout else 0 for i in chosen]
        t = torch.randint(scheduler.config.num_train_timesteps, (args.batch,))
        noise = torch.randn(args.batch, *latents.shape[1:])
        x = scheduler.add_noise(latents[chosen], noise, t)
        prediction = unet(x, t, text_encoder(tokens[texts])[0]).sample
        loss = F.mse_loss(prediction, scheduler.get_velocity(latents[chosen], noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(args.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        torch._foreach_copy_(parameters, averaged)


def main(args: Args) -> None:
    if args.out.exists():
        raise SystemExit(f"{args.out} exists: remove it or choose another --out")
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    kinds = all_scenes()
    scenes = [kinds[i % len(kinds)] for i in range(args.images)]
    images = [render(*s, rng) for s in tqdm(scenes, desc="render", mininterval=5)]
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2) / 127.5 - 1

    vae = train_vae(pixels, args)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        rebuilt = torch.cat([vae.decode(x).sample for x in latents[:1056].split(264)])
    rebuilt = VaeImageProcessor().postprocess(rebuilt, output_type="pil")
    right = np.mean([check(image, prompt_of(*s)).strict for image, s in zip(rebuilt, scenes)])
    print(f"VAE: {right:.3f} strict on {len(rebuilt)} reconstructions, {time.perf_counter() - start:.0f} s")

    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    text_encoder, unet = make_denoiser(tokenizer)
    print(
        f"parameters: U-Net {unet.num_parameters():,}, text encoder {text_encoder.num_parameters():,}, "
        f"VAE {vae.num_parameters():,}"
    )
    latents *= vae.config.scaling_factor
    models = (text_encoder, unet, latents, scenes, tokenizer, scheduler)
    train_denoiser(*models, DRAWING, args.draw_steps, args)
    train_reader(text_encoder, tokenizer, args)
    torch.manual_seed(args.seed)
    train_denoiser(*models, CAPTIONS, args.caption_steps, args)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = PROMPT_FILES["train"].read_text(encoding="utf-8").split("\n")[:200]
    images = pipeline(prompts, num_inference_steps=10, guidance_scale=1.0, eta=1.0).images
    strict = np.mean([check(i, p).strict for i, p in zip(images, prompts)])
    print(f"base: {strict:.3f} strict on {len(prompts)} training prompts")
    pipeline.to(torch.float16).save_pretrained(args.out)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file()) / 1e6
    print(f"{args.out}: {size:.1f} MB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args))
