"""Diff-MVAE on Caltech Birds (§4.1): generate images of birds from captions, and vice versa.

    python train_cub.py                     synthetic birds and captions, 32 px, minutes on a CPU
    python train_cub.py --data cub          the released data, 64 px, BERT and GPT-2, for a GPU
    python train_cub.py --data cub --small  32 px and small text models, an hour on a CPU

The same command continues a run that was stopped. Compared with train_celeba.py, only captions are
new. Like any modality, they have an encoder to (mu, logvar) and a decoder with log_prob and sample.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import diffmvae as dm
from diffmvae import InputError, batches, encode_rows, option, sample


@dataclass
class Settings(dm.Settings):
    """Settings for birds. README.md says which defaults are the paper's."""

    text: str = option("text models; small: from scratch; pretrained: from --bert and --gpt2",
                       "small", "pretrained", "small", choices=("small", "pretrained"))
    bert: str = option("caption encoder: name on Hugging Face, or folder", "bert-base-cased")
    gpt2: str = option("caption decoder: name on Hugging Face, or folder", "gpt2")
    optimus: str = option("file with Optimus weights for BERT and GPT-2 (§4.1)", "")
    max_length: int = option("maximum number of tokens in a caption", 28, 64, 32)
    clip: str = option("CLIP for the CLIP score of Table 2: name on Hugging Face, or folder", "")

    presets = {  # synthetic birds, CUB, CUB with --small
        "out": ("runs/birds", "runs/cub", "runs/cub-small"),
        "image_size": (32, 64, 32),
        # CUB has 5,994 training birds: 94,000 steps of 32 are 500 epochs, 20,000 of 8 are 27.
        "steps": (5000, 94_000, 20_000),
        "batch_size": (8, 32, 8),
        "log_prob_weight": (5.0, 5.0, 5.0),
        "latent_dim": (64, 768, 64),
        "model_channels": (24, 128, 24),
        "channel_mult": ([1, 2], [1, 2, 2, 4], [1, 2]),
        "diffusion_lr": (3e-3, 1e-4, 1e-3),
        "vae_lr": (5e-4, 5e-5, 5e-4),
        "prior_steps": (12_000, 10_000, 4000),
    }
    may_differ = (*dm.Settings.may_differ, "clip")


# ---- Synthetic birds, and captions in varied words from the same factors -------------------------

BIRDS = {"train": 8_000, "test": 500, "fresh": 500}
COLORS = {"black": (25, 25, 30), "white": (246, 246, 242), "grey": (140, 140, 146),
          "brown": (122, 76, 38), "red": (208, 38, 44), "yellow": (242, 208, 48),
          "blue": (48, 88, 205), "green": (58, 152, 70)}
SHAPES = {"short": [(112, 44)], "long": [(134, 44)],
          "curved": [(108, 32), (124, 50), (122, 80), (104, 62)]}  # of the bill
SIZES = {"small": 0.8, "large": 1.0}
SPOT = {"crown": (68, 24), "bill": (97, 47), "body": (82, 72), "wing": (42, 72), "belly": (64, 96)}
FACTORS = {**dict.fromkeys(SPOT, COLORS), "shape": SHAPES, "size": SIZES}
NOUNS = {"crown": "crown", "cap": "crown", "bill": "bill", "beak": "bill", "body": "body",
         "throat": "body", "wing": "wing", "wingbar": "wing", "belly": "belly", "breast": "belly"}
OPENINGS = ["this bird has", "a bird that has", "this {} bird has", "this is a {} bird with"]
PHRASE = rf"a (?:({'|'.join(SHAPES)}) )?({'|'.join(COLORS)}) ({'|'.join(NOUNS)})\b"


def render_bird(f, rng, size):
    """Render a bird with factors f; rng varies sky, tone and place -> uint8 (size, size, 3)."""
    sky = rng.integers((165, 195, 215), (195, 220, 240))
    canvas = Image.new("RGB", (128, 128), tuple(sky.tolist()))
    pen = ImageDraw.Draw(canvas)
    shift = rng.integers(-2, 3, 2)
    light = dict(zip(SPOT, rng.uniform(0.9, 1.03, len(SPOT))))
    tone = {k: tuple(int(c * light[k]) for c in COLORS[f[k]]) for k in SPOT}

    def add(shape, points, color, **options):
        """Draw a shape; a small bird is a large bird shrunk toward its throat."""
        points = SIZES[f["size"]] * (np.array(points) - [84, 54]) + [84, 54] + shift
        shape([tuple(point) for point in points], fill=color, **options)

    for x in (46, 64):  # legs
        add(pen.line, [(x, 100), (x, 126)], (90, 70, 60), width=4)
    add(pen.polygon, [(0, 50), (30, 60), (34, 90), (2, 76)], tone["body"])  # tail
    add(pen.ellipse, [(14, 44), (100, 116)], tone["body"])
    add(pen.chord, [(14, 44), (100, 116)], tone["belly"], start=12, end=160)
    add(pen.ellipse, [(40, 6), (98, 64)], tone["body"])  # head
    add(pen.chord, [(40, 6), (98, 64)], tone["crown"], start=180, end=360)
    add(pen.polygon, [(86, 30), *SHAPES[f["shape"]], (86, 66)], tone["bill"])
    add(pen.ellipse, [(10, 56), (62, 90)], tone["wing"])
    add(pen.ellipse, [(72, 38), (80, 46)], "black")  # eye
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def write_caption(f, rng):
    """Return a caption that names four or five parts of a bird with factors f."""
    chosen = rng.permutation(len(SPOT))[: rng.integers(4, 6)]
    phrases = []
    for part in [list(SPOT)[k] for k in sorted(chosen)]:
        noun = rng.choice([noun for noun, of in NOUNS.items() if of == part])
        shape = f["shape"] + " " if part == "bill" else ""
        phrases.append(f"a {shape}{f[part]} {noun}")
    opening = str(rng.choice(OPENINGS)).format(f["size"])
    return f"{opening} {' , '.join(phrases[:-1])} and {phrases[-1]}"


def parse_caption(caption):
    """Return the factors that a caption names: {part: color}, and the bill's shape and the size."""
    said = {NOUNS[noun]: color for _, color, noun in re.findall(PHRASE, caption)}
    said.update({"shape": word for word in caption.split() if word in SHAPES})
    said.update({"size": word for word in caption.split() if word in SIZES})
    return said


def read_colors(images):
    """Return [{part: color}], the colors nearest to images, (N, 3, H, W) in [−1, 1], at SPOT."""
    palette = torch.tensor(list(COLORS.values())) / 127.5 - 1  # (8, 3)
    x, y = torch.tensor(list(SPOT.values())).T * images.shape[-1] // 128  # (parts,) each
    seen = images[:, :, y, x].mT.cpu()  # (N, parts, 3)
    nearest = torch.cdist(seen, palette).argmin(-1).tolist()
    names = list(COLORS)
    return [{part: names[k] for part, k in zip(SPOT, row)} for row in nearest]


def synthetic_birds(size):
    """Return {split: (images, captions, factors)}, the same in every run: uint8 (N, 3, size, size)
    and, for each bird, ten captions and {factor: value}. "fresh" has further birds."""
    print("These birds are synthetic; --data cub uses real ones (see README.md).")
    data = {}
    for seed, (split, n) in enumerate(BIRDS.items()):
        rng = np.random.default_rng(seed)
        factors = [{k: str(rng.choice(list(FACTORS[k]))) for k in FACTORS} for _ in range(n)]
        images = [render_bird(f, rng, size) for f in tqdm(factors, f"rendering birds: {split}")]
        captions = [[write_caption(f, rng) for _ in range(10)] for f in factors]
        data[split] = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), captions, factors
    return data


# ---- CUB as released -----------------------------------------------------------------------------

def read_captions(path):
    """Return a file's first ten captions, repeated if fewer; U+FFFD becomes a space."""
    lines = dm.read_lines(path) if path.exists() else []
    captions = [" ".join(line.replace("\ufffd", " ").split()) for line in lines]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise InputError(f"{path} is missing or has no caption: unpack the captions again")
    return (captions * 10)[:10]


def read_birds(folder, size):
    """Return {split: (images, captions, None)}, like synthetic_birds without factors. Images are
    squeezed to squares, decoded once and then kept in a file next to them."""
    folder, root = Path(folder), Path(folder) / "CUB_200_2011"
    texts = folder / ("text" if (folder / "text").exists() else "text_c10")
    names = dict(line.split() for line in dm.read_lines(root / "images.txt"))
    is_train = dict(line.split() for line in dm.read_lines(root / "train_test_split.txt"))
    captions = [read_captions((texts / name).with_suffix(".txt")) for name in names.values()]

    def read(name):
        return np.asarray(dm.open_image(root / "images" / name, "RGB").resize((size, size)))

    cache = folder / f"diffmvae-images-{size}.pt"
    images = dm.decode_cached(cache, read, list(names.values())).permute(0, 3, 1, 2)
    data = {}
    for split, flag in (("train", "1"), ("test", "0")):
        rows = [row for row, k in enumerate(names) if is_train[k] == flag]
        np.random.default_rng(0).shuffle(rows)  # CUB is sorted by species; the first are evaluated
        data[split] = images[rows], [captions[row] for row in rows], None
    return data


# ---- Text VAE: BERT as encoder, GPT-2 as decoder, after Optimus (Li et al. 2020) -----------------

class TextEncoder(nn.Module):
    """q(z|caption): (B, 2, T) tokens, BERT's in [:, 0] -> (mu, logvar), each (B, D)."""

    def __init__(self, bert, latent_dim):
        super().__init__()
        self.bert = bert
        bert.set_attn_implementation("sdpa")  # it takes a bool mask
        self.linear = dm.widen_means(nn.Linear(bert.config.hidden_size, 2 * latent_dim, bias=False))

    def forward(self, tokens):
        tokens = tokens[:, 0]
        mask = tokens != self.bert.config.pad_token_id  # (B, T)
        h = self.bert(tokens, attention_mask=mask[:, None, None]).pooler_output
        return self.linear(h).chunk(2, dim=-1)


class TextDecoder(nn.Module):
    """p(caption|z) by GPT-2. One linear map of z is memory, an extra key and value in each layer;
    another is added to each token embedding. Padding is on the right, so no word attends to it."""

    def __init__(self, gpt2, latent_dim, max_length, every_subset):
        super().__init__()
        self.gpt2 = gpt2
        self.max_length = max_length
        self.every_subset = every_subset  # too expensive for GPT-2 at full size
        c = gpt2.config
        self.memory = nn.Linear(latent_dim, c.n_layer * c.n_embd, bias=False)
        self.embedding = nn.Linear(latent_dim, c.n_embd, bias=False)

    def remember(self, z):
        """Return a cache that holds z: one key and value per layer, (B, heads, 1, n_embd/heads)."""
        c = self.gpt2.config
        memory = self.memory(z).view(len(z), c.n_layer, c.n_head, 1, -1)
        return hf.DynamicCache([(m, m) for m in memory.unbind(1)])

    def forward(self, tokens, z, cache):
        """Return the last hidden states: (B, T) -> (B, T, n_embd). cache: keys, values so far."""
        x = self.gpt2.transformer.wte(tokens) + self.embedding(z)[:, None]  # (B, T, n_embd)
        return self.gpt2.transformer(inputs_embeds=x, past_key_values=cache, use_cache=True)[0]

    def logits(self, tokens, z, cache=None):
        """Return the logits of the next token after each token: (B, T) -> (B, T, V), float32."""
        cache = self.remember(z) if cache is None else cache
        return self.gpt2.lm_head(dm.in_bf16(self, tokens, z, cache))

    def log_prob(self, x, z):
        """log p(caption|z) in nats: (B, 2, T) tokens, GPT-2's in [:, 1] -> (B,)."""
        tokens, pad = x[:, 1], self.gpt2.config.pad_token_id
        logits = self.logits(tokens[:, :-1], z).transpose(1, 2)  # (B, V, T − 1)
        loss = F.cross_entropy(logits, tokens[:, 1:], ignore_index=pad, reduction="none")
        return -loss.sum(1)

    @torch.no_grad()
    def sample(self, z):
        """Decode greedily: the most probable token at each position, (B, max_length − 1)."""
        c = self.gpt2.config
        cache = self.remember(z)
        token = torch.full((len(z), 1), c.bos_token_id, device=z.device)
        ended = torch.zeros_like(token, dtype=torch.bool)
        tokens = []
        while len(tokens) < self.max_length - 1 and not ended.all():
            logits = self.logits(token, z, cache)  # (B, 1, V)
            token = logits.argmax(-1).masked_fill(ended, c.pad_token_id)
            tokens.append(token)
            ended = ended | (token == c.eos_token_id)
        rest = self.max_length - 1 - len(tokens)
        return F.pad(torch.cat(tokens, dim=1), (0, rest), value=c.pad_token_id)


def load_optimus(path, encoder, decoder):
    """Load Optimus weights, such as Optimus's training.bin; no code in the file is executed."""
    ours = {"encoder.linear": "0.linear", "decoder.transformer.linear_emb": "1.embedding",
            "decoder.transformer.linear": "1.memory", "encoder": "0.bert", "decoder": "1.gpt2"}
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, "cpu", weights_only=True)
    renamed = {}
    for key, value in state.get("model_state_dict", state).items():
        for theirs, name in ours.items():
            key = re.sub(rf"^(module\.)?{re.escape(theirs)}\.", f"{name}.", key)
        renamed[key] = value
    missing = nn.ModuleList([encoder, decoder]).load_state_dict(renamed, strict=False).missing_keys
    if missing:
        raise InputError(f"{path} lacks {len(missing)} Optimus weights, such as {missing[0]}")


def word_tokenizer(captions, special):
    """Return a tokenizer of the lowercase words that occur at least twice in captions."""
    base = Tokenizer(models.WordLevel(unk_token="<UNK>"))
    base.normalizer = normalizers.Lowercase()
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    reserved = [*special.values(), "<UNK>"]
    trainer = trainers.WordLevelTrainer(min_frequency=2, special_tokens=reserved)
    base.train_from_iterator(captions, trainer)
    if base.get_vocab_size() == len(reserved):
        raise InputError("no word occurs twice in the captions: --text small needs such words")
    return hf.PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<UNK>", **special)


SMALL_TEXT = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
              "num_attention_heads": 4, "initializer_range": 128**-0.5, "hidden_dropout_prob": 0.0,
              "attention_probs_dropout_prob": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
              "attn_pdrop": 0.0}


def load_text_parts(bert, gpt2, **options):
    """Return the tokenizers and configurations that from_pretrained finds for BERT and GPT-2."""
    tokenizers = [hf.AutoTokenizer.from_pretrained(name, **options) for name in (bert, gpt2)]
    for name, tokenizer in zip((bert, gpt2), tokenizers):
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise InputError(f"the tokenizer of {name} has no vocabulary: its files are missing")
    return tokenizers, [hf.BertConfig.from_pretrained(bert, **options),
                        hf.GPT2Config.from_pretrained(gpt2, **options)]


def text_parts(s, captions):
    """Return tokenizers and configurations for a new run; small ones know the words of captions."""
    special = {"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"}
    if s.text == "small":
        tokenizers = 2 * [word_tokenizer(captions, special)]
        configs = [hf.BertConfig(**SMALL_TEXT), hf.GPT2Config(**SMALL_TEXT)]
    else:
        tokenizers, configs = load_text_parts(s.bert, s.gpt2)
        tokenizers[1].add_special_tokens(special)
    ids = {f"{name}_id": getattr(tokenizers[1], f"{name}_id") for name in special}
    for config in configs if s.text == "small" else configs[1:]:  # BERT has its own
        config.update({"vocab_size": len(tokenizers[1]), **ids})
    return tokenizers, configs


def init_text(s, encoder, decoder):
    """Load pretrained weights. Small models instead get sinusoidal positions (after Vaswani et al.
    2017), to tell neighbors apart early, and wider μ, because [CLS] hardly varies at first."""
    bert, gpt2 = encoder.bert, decoder.gpt2
    if s.text == "small":
        for positions in (bert.embeddings.position_embeddings, gpt2.transformer.wpe):
            waves = torch.arange(len(positions.weight))[:, None] / 100 ** torch.linspace(0, 1, 64)
            positions.weight.data = 0.3 * torch.cat([waves.sin(), waves.cos()], dim=1)  # (n, 128)
        dm.widen_means(encoder.linear, 2)
    else:
        for model, name in ((bert, s.bert), (gpt2, s.gpt2)):
            theirs, info = type(model).from_pretrained(name, output_loading_info=True)
            missing = set(info["missing_keys"]) - {"lm_head.weight"}  # tied to the embedding
            if missing:
                raise InputError(f"{name} lacks weights, which would stay random: {missing}")
            theirs.resize_token_embeddings(model.config.vocab_size)
            model.load_state_dict(theirs.state_dict())
    if s.optimus:
        load_optimus(s.optimus, encoder, decoder)


def tokenize(tokenizers, captions, length):
    """Return the tokens of N captions for BERT and for GPT-2, (N, 2, length), padded on the right.
    Long captions are cut but keep their end token; strings like <EOS> are plain text."""
    captions = [text.replace("<UNK>", "UNK") for text in captions]  # one unknown word
    rows = []
    for tokenizer in tokenizers:
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if begin is None:  # BERT has its own
            begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
        options = {"add_special_tokens": False, "split_special_tokens": True}
        padded = torch.full((len(captions), length), tokenizer.pad_token_id)
        for row, text in zip(padded, tokenizer(captions, **options)["input_ids"]):
            tokens = [begin, *text[: length - 2], end]
            row[: len(tokens)] = torch.tensor(tokens)
        rows.append(padded)
    return torch.stack(rows, dim=1)


def detokenize(tokenizers, tokens):
    """Return GPT-2's tokens, (N, T), as N strings, in which an unknown word is <UNK>."""
    words = tokenizers[1]
    hidden = {words.pad_token_id, words.bos_token_id, words.eos_token_id}
    return [words.decode([k for k in row if k not in hidden]) for row in tokens.tolist()]


# ---- The two modalities --------------------------------------------------------------------------

def to_tensors(birds, tokenizers, length):
    """Return {split: {modality: (N, ...)}} for {split: (images, captions, ...)}."""
    data = {}
    for split, (images, captions, _) in tqdm(birds.items(), "tokenizing captions"):
        flat = [caption for ten in captions for caption in ten]
        tokens = tokenize(tokenizers, flat, length)  # (10 N, 2, length)
        data[split] = {"image": images, "caption": tokens.unflatten(0, (-1, 10))}
    return data


def get_batch(data, i=slice(None)):
    """Return examples i for the networks: images in [−1, 1] and one caption of each, at random."""
    captions = data["caption"][i].long()  # (B, 10, 2, T)
    chosen = torch.randint(captions.shape[1], (len(captions), 1, 1, 1), device=captions.device)
    caption = captions.take_along_dim(chosen, 1)[:, 0]  # (B, 2, T)
    return {"image": data["image"][i] / 127.5 - 1, "caption": caption}


def build(s, configs, init=False):
    """Return the untrained model and latent prior for the settings s (§4.1) and the configurations
    of BERT and GPT-2. init: call init_text, which resumed and loaded runs do not need."""
    image_encoder, image_decoder = dm.image_networks(s)
    bert, gpt2 = hf.BertModel(configs[0]), hf.GPT2LMHeadModel(configs[1])
    text_encoder = TextEncoder(bert, s.latent_dim)
    text_decoder = TextDecoder(gpt2, s.latent_dim, s.max_length, every_subset=s.text == "small")
    if init:
        with torch.random.fork_rng():  # so that the prior starts the same, resumed or not
            init_text(s, text_encoder, text_decoder)
    encoders = {"image": image_encoder, "caption": text_encoder}
    decoders = {"image": image_decoder, "caption": text_decoder}
    return dm.build_pair(s, encoders, decoders, {"caption": s.log_prob_weight}, (s.latent_dim,))


def load(out, device="cpu"):
    """Return the trained (model, prior, tokenizers) of the finished run in the folder out."""
    tokenizers, configs = load_text_parts(f"{out}/bert", f"{out}/gpt2", local_files_only=True)
    model, prior = dm.load_run(out, Settings, lambda s: build(s, configs), device)
    return model, prior, tokenizers


# ---- Evaluation (Tables 1 and 2), samples (Figures 3 and 4), and the run -------------------------

@torch.no_grad()
def mean_log_prob(decoder, captions, z):
    """Return the mean of log p(caption|z) in nats, for (N, 2, T) tokens and z: (N, D)."""
    pieces = batches({"x": captions, "z": z}, "log p(caption|z)", 32)
    return torch.cat([decoder.log_prob(piece["x"], piece["z"]) for piece in pieces]).mean().item()


def caption_log_prob(model, x):
    """Return {source of z: {"nats": mean of log p(caption|z)}} for the examples x."""
    z = {"image": encode_rows(model, x, ["image"])}
    z["another bird's image"] = z["image"].roll(len(z["image"]) // 2, 0)
    if "caption" in model.encoders:  # not in Supervised
        z["caption"] = encode_rows(model, x, ["caption"])
    return {label: {"nats": mean_log_prob(model.decoders["caption"], x["caption"], rows)}
            for label, rows in z.items()}


def generate(path, model, tokenizers, x, captions, n, prior=None, training=None):
    """Return {label: {"image": images, "caption": strings}}: the real x, each modality from the
    other (n images) and, with the prior, unconditional pairs. Save the first eight of each."""
    text = sample(model.decoders, "caption", encode_rows(model, x, ["image"]))
    pairs = {"real": {"image": x["image"], "caption": captions},
             "caption from image": {"image": x["image"], "caption": detokenize(tokenizers, text)}}
    if "image" in model.decoders:  # not in Supervised
        z = encode_rows(model, x, ["caption"])[:n]
        image = sample(model.decoders, "image", z)
        pairs["image from caption"] = {"image": image, "caption": captions[:n]}
    if prior is not None:
        for label, z in dm.unconditional_latents(model, prior, training).items():
            image = sample(model.decoders, "image", z)
            text = sample(model.decoders, "caption", z)
            pairs[label] = {"image": image, "caption": detokenize(tokenizers, text)}
    images = {label: y["image"][:8] for label, y in pairs.items()}
    dm.save_grid(path, images, {label: y["caption"][:8] for label, y in pairs.items()}, side=128)
    return pairs


def agreement(named, actual):
    """Return the share of equal values over the factors that both dicts of a pair contain."""
    equal = [a[k] == b[k] for a, b in zip(named, actual) for k in a.keys() & b.keys()]
    return float(np.mean(equal)) if equal else 0.0


def coherence(pairs, factors):
    """Return {label: {metric: value}}: the share of the colors named in captions that the images
    show and, for captions of real images, the share of all named factors that are correct."""
    table = {}
    for label, x in pairs.items():
        named = [parse_caption(caption) for caption in x["caption"]]
        table[label] = {"color_accuracy": agreement(named, read_colors(x["image"]))}
        if label in ("real", "caption from image"):
            table[label]["caption_accuracy"] = agreement(named, factors)
    return table


@torch.no_grad()
def table2(clip, tokenizer, pairs, device):
    """Return {label: {"clip_score": mean 100 cos}} (Hessel et al. 2021 use 2.5 max(cos, 0))."""
    side = clip.config.vision_config.image_size
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=device)[..., None, None]
    table = {}
    for label, x in pairs.items():
        tokens = tokenizer(x["caption"], padding=True, truncation=True, return_tensors="pt")
        cosines = []
        for piece in batches({"image": x["image"], **tokens.to(device)}, "CLIP"):
            pixels = F.interpolate(piece.pop("image"), (side, side), mode="bicubic", antialias=True)
            image = clip.get_image_features(((pixels + 1) / 2 - mean) / std).pooler_output  # (n, d)
            text = clip.get_text_features(**piece).pooler_output
            cosines.append(F.cosine_similarity(image, text))
        table[label] = {"clip_score": 100 * torch.cat(cosines).mean().item()}
    return table


def evaluate(evaluator, pairs, real):
    """Return evaluate_images with the mean log-probability of captions given their images."""
    model, _, tokenizers = evaluator
    decoder = model.decoders["caption"]

    def metric(features, x):
        tokens = tokenize(tokenizers, x["caption"], decoder.max_length).to(features.device)
        return {"caption_log_prob": mean_log_prob(decoder, tokens, features)}

    return dm.evaluate_images(model, pairs, real, metric)


def run(s):
    """Train the model and its prior; save samples.png and results.json."""
    evaluator = dm.load_evaluator(s, load) if s.evaluator else None  # (model, prior, tokenizers)
    birds = read_birds(s.data, s.image_size) if s.data else synthetic_birds(s.image_size)
    started = Path(s.out, "model.pt").exists()
    if started:
        saved = f"{s.out}/bert", f"{s.out}/gpt2"
        tokenizers, configs = load_text_parts(*saved, local_files_only=True)
    else:
        tokenizers, configs = text_parts(s, [c for ten in birds["train"][1] for c in ten])
        for name, tokenizer, config in zip(("bert", "gpt2"), tokenizers, configs):
            tokenizer.save_pretrained(f"{s.out}/{name}")
            config.save_pretrained(f"{s.out}/{name}")
    data = to_tensors(birds, tokenizers, s.max_length)
    data = {split: {k: x.to(s.device) for k, x in part.items()} for split, part in data.items()}
    torch.manual_seed(s.seed)
    model, prior = build(s, configs, init=not started)
    test = get_batch({**data["test"], "caption": data["test"]["caption"][:, :1]})  # the first ones
    captions, factors = [ten[0] for ten in birds["test"][1]], birds["test"][2]

    def preview(ema_model):
        x = {name: value[:8] for name, value in test.items()}
        generate(Path(s.out, "preview.png"), ema_model, tokenizers, x, captions[:8], 8)

    model = dm.train_model(s, data, model, get_batch, preview)
    if prior is not None:
        prior = dm.train_prior(s, data["train"], model, prior, get_batch)
    torch.manual_seed(s.seed)
    tables = {"caption_log_prob": caption_log_prob(model, test)}
    n = min(s.num_samples, len(captions))
    path, training = Path(s.out, "samples.png"), get_batch(data["train"], slice(n))
    pairs = generate(path, model, tokenizers, test, captions, n, prior, training)
    if factors is not None:
        tables["coherence"] = coherence(pairs, factors)
    if s.clip:
        clip = hf.CLIPModel.from_pretrained(s.clip).to(s.device)
        tables["clip"] = table2(clip, hf.AutoTokenizer.from_pretrained(s.clip), pairs, s.device)
    if s.is_bound:
        tables["elbo"] = dm.evaluate_elbo(model, data["test"], get_batch)
    if evaluator is not None:
        generated = {k: x for k, x in pairs.items() if k not in ("real", "caption from image")}
        if "fresh" in data:
            fresh = [ten[0] for ten in birds["fresh"][1][:n]]
            generated["fresh"] = {**get_batch(data["fresh"], slice(n)), "caption": fresh}
        tables["images"] = evaluate(evaluator, generated, test["image"])
    dm.save_results(s, tables)


if __name__ == "__main__":
    dm.main(run, Settings, __doc__)
