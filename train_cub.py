"""Diff-MVAE on Caltech Birds (§4.1): a bird's image and its caption, each from the other.

    python train_cub.py               draws birds and captions, 32 px: eleven minutes on two cores
    python train_cub.py --data cub    the released data, 64 px, BERT and GPT-2, for a GPU
    python train_cub.py --data cub --small    32 px and small text models, an hour on one core

New beside train_celeba.py is only a modality: the caption's encoder returns (mu, logvar), its
decoder has log_prob and sample. The same command run again goes on where it stopped.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import diffmvae
from diffmvae import (
    InputError, batches, build_model, build_prior, check_judge, check_splits, decode_cached,
    features, frechet_distance, image_networks, in_bf16, infer, judged, load_run, main, nats,
    on_device, open_picture, option, own_random_numbers, read_lines, read_table, sample, save_grid,
    save_results, train, unconditional, why, widen_means,
)


@dataclass
class Settings(diffmvae.Settings):
    """Drawn birds train in minutes on a CPU; README.md says which of the real ones' settings are
    the paper's, its authors' or ours."""

    text: str = option("small: words, untrained; pretrained: from --bert and --gpt2",
                       choices=("small", "pretrained"))
    bert: str = option("encoder of the text: name in the hub, or local folder", "bert-base-cased")
    gpt2: str = option("decoder of the text: name in the hub, or local folder", "gpt2")
    optimus: str = option("file of Optimus weights to load into these two (§4.1)", "")
    tokens: int = option("longest caption; what is beyond is cut", least=3)
    clip: str = option("CLIP for Tables 1 and 2: name in the hub, or local folder", "")

    defaults = {  # drawn birds, CUB, CUB with --small
        **diffmvae.Settings.defaults,
        "out": ("runs/birds", "runs/cub", "runs/cub-small"),
        "size": (32, 64, 32),
        # Of CUB's 5,994 birds to train on 94,000 steps of 32 are 500 epochs, 20,000 of 8 are 27.
        "steps": (5000, 94_000, 20_000),
        "batch_size": (8, 32, 8),
        "latent_dim": (64, 768, 64),
        "channels": (24, 128, 24),
        "multipliers": ([1, 2], [1, 2, 2, 4], [1, 2]),
        "rate": (3e-3, 1e-4, 1e-3),
        "vae_rate": (5e-4, 5e-5, 5e-4),
        "prior_steps": (12_000, 10_000, 4000),
        "text": ("small", "pretrained", "small"),
        "tokens": (28, 64, 32),
    }
    surrogate_weight = 5.0
    # The first evaluation paints z's colours; each further one at high noise lets chance ones in.
    drawn_evaluations = 8
    may_change = (*diffmvae.Settings.may_change, "clip")


# ---- Drawn birds, and captions in varied words from the same factors -----------------------------

class Birds(NamedTuple):
    """The birds of a split, drawn or real."""

    pictures: torch.Tensor  # (N, 3, size, size) uint8
    captions: list  # ten for each bird
    factors: list  # {factor: value} for each bird, or None of real ones


BIRDS = {"train": 8_000, "test": 500, "anew": 500}
COLOURS = {"black": (25, 25, 30), "white": (246, 246, 242), "grey": (140, 140, 146),
           "brown": (122, 76, 38), "red": (208, 38, 44), "yellow": (242, 208, 48),
           "blue": (48, 88, 205), "green": (58, 152, 70)}
SHAPES = {"short": [(112, 44)], "long": [(134, 44)],
          "curved": [(108, 32), (124, 50), (122, 80), (104, 62)]}  # of the bill
SIZES = {"small": 0.8, "large": 1.0}
SPOT = {"crown": (68, 24), "bill": (97, 47), "body": (82, 72), "wing": (42, 72), "belly": (64, 96)}
FACTORS = {**dict.fromkeys(SPOT, COLOURS), "shape": SHAPES, "size": SIZES}
NOUNS = {"crown": "crown", "cap": "crown", "bill": "bill", "beak": "bill", "body": "body",
         "throat": "body", "wing": "wing", "wingbar": "wing", "belly": "belly", "breast": "belly"}
OPENINGS = ["this bird has", "a bird that has", "this {} bird has", "this is a {} bird with"]
PHRASE = rf"a (?:({'|'.join(SHAPES)}) )?({'|'.join(COLOURS)}) ({'|'.join(NOUNS)})\b"


def draw_bird(f, rng, size):
    """Picture (size, size, 3) of a bird with factors f; background, tone and place are rng's."""
    sky = rng.integers((165, 195, 215), (195, 220, 240))
    canvas = Image.new("RGB", (128, 128), tuple(sky.tolist()))
    pen = ImageDraw.Draw(canvas)
    shift = rng.integers(-2, 3, 2)
    light = dict(zip(SPOT, rng.uniform(0.9, 1.03, len(SPOT))))
    tone = {k: tuple(int(c * light[k]) for c in COLOURS[f[k]]) for k in SPOT}

    def add(shape, points, colour, **options):
        """A small bird is a large one shrunk towards its throat."""
        points = SIZES[f["size"]] * (np.array(points) - [84, 54]) + [84, 54] + shift
        shape([tuple(point) for point in points], fill=colour, **options)

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
    """A caption that names four or all five of the parts of a bird with factors f."""
    chosen = rng.permutation(len(SPOT))[: rng.integers(4, 6)]
    parts = [list(SPOT)[k] for k in sorted(chosen)]
    phrases = []
    nouns = [rng.choice([noun for noun, of in NOUNS.items() if of == part]) for part in parts]
    for part, noun in zip(parts, nouns):
        shape = f["shape"] + " " if part == "bill" else ""
        phrases.append(f"a {shape}{f[part]} {noun}")
    opening = str(rng.choice(OPENINGS)).format(f["size"])
    return f"{opening} {' , '.join(phrases[:-1])} and {phrases[-1]}"


def parse(caption):
    """What a caption says: {part: colour}, with the bill's shape and the size where it tells."""
    said = {NOUNS[noun]: colour for _, colour, noun in re.findall(PHRASE, caption)}
    for word in caption.split():
        if word in SHAPES:
            said["shape"] = word
        if word in SIZES:
            said["size"] = word
    return said


def read_colours(pictures):
    """[{part: colour}] of pictures (N, 3, H, W) in [−1, 1]: the nearest at each part's spot."""
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1  # (8, 3)
    x, y = torch.tensor(list(SPOT.values())).T * pictures.shape[-1] // 128  # (parts,) each
    seen = pictures[:, :, y, x].mT.cpu()  # (N, parts, 3)
    nearest = torch.cdist(seen, palette).argmin(-1).tolist()
    names = list(COLOURS)
    return [{part: names[k] for part, k in zip(SPOT, row)} for row in nearest]


def draw_birds(size):
    """{split: Birds}, the same at every run. "anew" are more of them: as close to those of "test"
    as pictures can be."""
    print("These birds are drawn; --data cub takes real ones (see README.md).")
    data = {}
    for seed, (split, n) in enumerate(BIRDS.items()):
        rng = np.random.default_rng(seed)
        factors = [{k: str(rng.choice(list(FACTORS[k]))) for k in FACTORS} for _ in range(n)]
        pictures = [draw_bird(f, rng, size) for f in tqdm(factors, f"drawing birds: {split}")]
        captions = [[write_caption(f, rng) for _ in range(10)] for f in factors]
        pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        data[split] = Birds(pictures, captions, factors)
    return data


# ---- CUB as released -----------------------------------------------------------------------------

def read_captions(path):
    """Ten captions of a file's lines: fewer are repeated, more are cut."""
    lines = []
    if path.exists():
        lines = [line.strip() for line in read_lines(path) if line.strip()]
    if not lines:
        raise InputError(f"{path} is missing or holds no caption: unpack the captions again")
    return (lines * 10)[:10]


def read_birds(folder, size):
    """As draw_birds, but without factors; the pictures are decoded once, then cached there."""
    folder = Path(folder)
    root = folder / "CUB_200_2011"
    images = root / "images"
    texts = folder / ("text" if (folder / "text").exists() else "text_c10")
    for path in (root / "images.txt", root / "train_test_split.txt", images, texts):
        if not path.exists():
            raise InputError(f"{path} is missing: --data needs CUB_200_2011 and text as released")
    names = read_table(root / "images.txt", lambda k, name: (k, name))
    flag = {"1": "train", "0": "test"}
    split_of = read_table(root / "train_test_split.txt", lambda k, i: (k, flag[i]), keys=names)
    if len(split_of) > len(names):
        raise InputError(f"{root / 'images.txt'} has {len(names)} pictures, train_test_split.txt "
                         f"{len(split_of)}: get it anew")
    rows = {split: [row for row, k in enumerate(names) if split_of[k] == split]
            for split in flag.values()}
    check_splits(rows, root / "train_test_split.txt")
    captions = [read_captions((texts / name).with_suffix(".txt")) for name in names.values()]

    def read(name):
        return np.asarray(open_picture(images / name, "RGB").resize((size, size)))

    pictures = decode_cached(folder / f"diffmvae-{size}.pt", read, list(names.values()))
    pictures = pictures.permute(0, 3, 1, 2)
    return {split: Birds(pictures[rows[split]], [captions[row] for row in rows[split]], None)
            for split in rows}


# ---- Text VAE: in through BERT, out through GPT-2, as Optimus (Li et al. 2020) -------------------

class TextEncoder(nn.Module):
    """q(z|caption): (B, 2, T) tokens, of which BERT reads [:, 0] -> (mu, logvar), each (B, D)."""

    def __init__(self, bert, latent_dim):
        super().__init__()
        self.bert = bert
        bert.set_attn_implementation("sdpa")  # whose mask is bool
        self.linear = widen_means(nn.Linear(bert.config.hidden_size, 2 * latent_dim, bias=False))

    def forward(self, tokens):
        tokens = tokens[:, 0]
        mask = tokens != self.bert.config.pad_token_id  # (B, T)
        h = self.bert(tokens, attention_mask=mask[:, None, None]).pooler_output
        return self.linear(h).chunk(2, dim=-1)


class TextDecoder(nn.Module):
    """p(caption|z): GPT-2 has z as memory, the key and value of one more position in every layer,
    and in the embedding of every token. Padding is on the right, where no token looks."""

    def __init__(self, gpt2, latent_dim, longest, every_subset):
        super().__init__()
        self.gpt2 = gpt2
        self.longest = longest
        self.every_subset = every_subset  # not GPT-2 at full size: it decodes one subset a step
        c = gpt2.config
        self.memory = nn.Linear(latent_dim, c.n_layer * c.n_embd, bias=False)
        self.embedding = nn.Linear(latent_dim, c.n_embd, bias=False)

    def remember(self, z):
        """The cache that holds z alone: a layer's key and value are (B, heads, 1, n_embd/heads)."""
        c = self.gpt2.config
        memory = self.memory(z).view(len(z), c.n_layer, c.n_head, 1, -1)
        return hf.DynamicCache([(m, m) for m in memory.unbind(1)])

    def forward(self, tokens, z, cache):
        """Last hidden states of tokens (B, T), (B, T, n_embd); cache holds what comes before."""
        x = self.gpt2.transformer.wte(tokens) + self.embedding(z)[:, None]  # (B, T, n_embd)
        return self.gpt2.transformer(inputs_embeds=x, past_key_values=cache, use_cache=True)[0]

    def logits(self, tokens, z, cache=None):
        """Of what follows each of tokens, (B, T) -> (B, T, V) in float32."""
        cache = self.remember(z) if cache is None else cache
        return self.gpt2.lm_head(in_bf16(self, tokens, z, cache))

    def log_prob(self, x, z):
        """log p(caption|z) in nats, x: (B, 2, T) tokens, of which [:, 1] are GPT-2's -> (B,)."""
        tokens, pad = x[:, 1], self.gpt2.config.pad_token_id
        logits = self.logits(tokens[:, :-1], z).transpose(1, 2)  # (B, V, T − 1)
        loss = F.cross_entropy(logits, tokens[:, 1:], ignore_index=pad, reduction="none")
        return -loss.sum(1)

    @torch.no_grad()
    def sample(self, z):
        """The captions, (B, longest − 1) tokens, whose every token is the likeliest."""
        c = self.gpt2.config
        cache = self.remember(z)
        token = torch.full((len(z), 1), c.bos_token_id, device=z.device)
        ended = torch.zeros_like(token, dtype=torch.bool)
        tokens = []
        while len(tokens) < self.longest - 1 and not ended.all():
            logits = self.logits(token, z, cache)  # (B, 1, V)
            token = logits.argmax(-1).masked_fill(ended, c.pad_token_id)
            tokens.append(token)
            ended = ended | (token == c.eos_token_id)
        rest = self.longest - 1 - len(tokens)
        return F.pad(torch.cat(tokens, dim=1), (0, rest), value=c.pad_token_id)


def pretrained(kind, name):
    """kind.from_pretrained of a local folder or a name in the hub."""
    try:
        if issubclass(kind, hf.PretrainedConfig):
            return kind.from_pretrained(name)
        if kind is hf.AutoTokenizer:
            words = kind.from_pretrained(name)
            if len(words) <= len(words.all_special_tokens):
                raise ValueError("it has no words")
            return words
        model, info = kind.from_pretrained(name, output_loading_info=True)
        missing = set(info["missing_keys"]) - {"lm_head.weight"}  # which is tied
        if missing:
            raise ValueError(f"it lacks {min(missing)}")
        return model
    except Exception as problem:  # the hub's errors have no class in common
        raise InputError(f"{name} cannot be had as {kind.__name__} ({why(problem)}): give a local "
                         "folder with its files, or connect to the hub") from problem


def load_optimus(path, encoder, decoder):
    """Load Optimus weights into a TextEncoder of BERT and a TextDecoder of GPT-2.

    Optimus's own file, training.bin, holds its command line, too; nothing in it is executed.
    """
    ours = {"encoder.linear": "0.linear", "decoder.transformer.linear_emb": "1.embedding",
            "decoder.transformer.linear": "1.memory", "encoder": "0.bert", "decoder": "1.gpt2"}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, "cpu", weights_only=True)
        renamed = {}
        for key, value in state.get("model_state_dict", state).items():
            key = key.removeprefix("module.")
            for theirs, name in ours.items():
                if key.startswith(theirs + "."):
                    key = name + key.removeprefix(theirs)
            renamed[key] = value
        pair = nn.ModuleList([encoder, decoder])
        missing = pair.load_state_dict(renamed, strict=False).missing_keys
        if missing:
            raise ValueError(f"it lacks {missing[0]} and {len(missing) - 1} more")
    except Exception as problem:  # torch has no class for what is no such file
        raise InputError(f"{path} cannot be loaded ({why(problem)}): give a file of Optimus "
                         "weights that fits --latent-dim") from problem


def word_tokenizer(captions):
    """A tokenizer of the lower-case words that captions have at least twice."""
    special = {"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"}
    base = Tokenizer(models.WordLevel(unk_token="<UNK>"))
    base.normalizer = normalizers.Lowercase()
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    reserved = [*special.values(), "<UNK>"]
    trainer = trainers.WordLevelTrainer(min_frequency=2, special_tokens=reserved)
    base.train_from_iterator(captions, trainer)
    if base.get_vocab_size() == len(reserved):
        raise InputError("no word is twice in the captions: --text small needs such words")
    return hf.PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<UNK>", **special)


SMALL_TEXT = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
              "num_attention_heads": 4, "initializer_range": 128**-0.5, "hidden_dropout_prob": 0.0,
              "attention_probs_dropout_prob": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
              "attn_pdrop": 0.0}


def text_parts(s, captions):
    """For BERT and for GPT-2 the tokenizers, and the configurations; small: of the captions' words.
    """
    if s.text == "small":
        tokenizers = 2 * [word_tokenizer(captions)]
        configs = [hf.BertConfig(**SMALL_TEXT), hf.GPT2Config(**SMALL_TEXT)]
    else:
        tokenizers = [pretrained(hf.AutoTokenizer, name) for name in (s.bert, s.gpt2)]
        tokenizers[1].add_special_tokens({"pad_token": "<PAD>", "bos_token": "<BOS>",
                                          "eos_token": "<EOS>"})
        configs = [pretrained(hf.BertConfig, s.bert), pretrained(hf.GPT2Config, s.gpt2)]
    special = {f"{k}_token_id": getattr(tokenizers[1], f"{k}_token_id")
               for k in ("pad", "bos", "eos")}
    configs[1].update({"vocab_size": len(tokenizers[1]), **special})
    if s.text == "small":
        configs[0].update({"vocab_size": len(tokenizers[0]), **special})
    return tokenizers, configs


def save_text_parts(out, tokenizers, configs):
    """They belong to the run: nothing else than its folder is needed to load it."""
    for end, tokenizer, config in zip(("in", "out"), tokenizers, configs):
        tokenizer.save_pretrained(f"{out}/tokenizer-{end}")
        config.to_json_file(f"{out}/text-{end}.json", use_diff=False)


def read_text_parts(out):
    """Those of a run."""
    tokenizers, configs = [], []
    for end, kind in (("in", hf.BertConfig), ("out", hf.GPT2Config)):
        folder, file = Path(out) / f"tokenizer-{end}", Path(out) / f"text-{end}.json"
        if not (folder.is_dir() and file.exists()):  # and never from the hub
            raise InputError(f"{folder} or {file.name} is missing: that run has to be made first")
        tokenizers.append(pretrained(hf.AutoTokenizer, str(folder)))
        configs.append(kind.from_json_file(file))
    return tokenizers, configs


def start_text(s, encoder, decoder):
    """What the text models start from: pretrained weights or, of small ones, sinusoids in the
    manner of Vaswani et al. (2017) for positions: by them neighbours find each other sooner; and z
    twice as wide again, as [CLS] hardly differs between captions at first."""
    bert, gpt2 = encoder.bert, decoder.gpt2
    if s.text == "pretrained":
        bert.load_state_dict(pretrained(hf.BertModel, s.bert).state_dict())
        theirs = pretrained(hf.GPT2LMHeadModel, s.gpt2)
        theirs.resize_token_embeddings(gpt2.config.vocab_size)
        gpt2.load_state_dict(theirs.state_dict())
    else:
        for positions in (bert.embeddings.position_embeddings, gpt2.transformer.wpe):
            n = len(positions.weight)
            waves = torch.arange(n)[:, None] / 100 ** torch.linspace(0, 1, 64)  # (n, 64)
            positions.weight.data = 0.3 * torch.cat([waves.sin(), waves.cos()], dim=1)  # (n, 128)
        widen_means(encoder.linear, 2)
    if s.optimus:
        load_optimus(s.optimus, encoder, decoder)


def tokenise(tokenizers, captions, length):
    """N captions as BERT's tokens and GPT-2's, (N, 2, length), padded on the right.

    Too long ones lose words, never their end. What looks like a special token is text.
    """
    if isinstance(captions, str):
        raise InputError("captions: give a list of them, not one string")
    rows = []
    for words in tokenizers:
        begin, end = words.bos_token_id, words.eos_token_id
        if begin is None:  # BERT's own
            begin, end = words.cls_token_id, words.sep_token_id
        options = {"add_special_tokens": False, "split_special_tokens": True}
        texts = words(captions, **options)["input_ids"] if captions else []
        padded = torch.full((len(captions), length), words.pad_token_id)
        for row, text in zip(padded, texts):
            tokens = [begin, *text[: length - 2], end]
            row[: len(tokens)] = torch.tensor(tokens)
        rows.append(padded)
    return torch.stack(rows, dim=1)


def spell(tokenizers, tokens):
    """GPT-2's tokens, (N, T), as N captions."""
    return tokenizers[1].batch_decode(tokens, skip_special_tokens=True)


# ---- The two modalities --------------------------------------------------------------------------

def tensors(birds, tokenizers, length):
    """Birds of draw_birds or read_birds as {split: {modality: (N, ...)}}."""
    data = {}
    for split, part in birds.items():
        flat = [caption for ten in part.captions for caption in ten]
        tokens = tokenise(tokenizers, flat, length)  # (10 N, 2, length)
        data[split] = {"image": part.pictures, "caption": tokens.unflatten(0, (-1, 10))}
    return data


def get_batch(data, i=slice(None)):
    """Examples i as the networks see them, with one of their captions drawn."""
    captions = data["caption"][i].long()  # (B, 10, 2, T)
    drawn = torch.randint(captions.shape[1], (len(captions), 1, 1, 1), device=captions.device)
    caption = captions.take_along_dim(drawn, 1)[:, 0]  # (B, 2, T)
    return {"image": data["image"][i] / 127.5 - 1, "caption": caption}


def first_captions(data):
    """data with the first caption of each example alone."""
    return {**data, "caption": data["caption"][:, :1]}


def build(s, configs, fresh=False):
    """The model and latent prior for settings s (§4.1) and the configurations of BERT and GPT-2,
    untrained; fresh: with what the text models start from."""
    image_encoder, image_decoder = image_networks(s)
    bert, gpt2 = hf.BertModel(configs[0]), hf.GPT2LMHeadModel(configs[1])
    text_encoder = TextEncoder(bert, s.latent_dim)
    text_decoder = TextDecoder(gpt2, s.latent_dim, s.tokens, every_subset=s.text == "small")
    if fresh:
        with own_random_numbers():  # the prior starts alike, whether a run is begun or resumed
            start_text(s, text_encoder, text_decoder)
    encoders = {"image": image_encoder, "caption": text_encoder}
    decoders = {"image": image_decoder, "caption": text_decoder}
    model = build_model(s, encoders, decoders, {"caption": s.label_weight})
    return model, build_prior(s, (s.latent_dim,))


def load(out, device="cpu"):
    """(model, prior, tokenizers) that a finished run left in the folder out."""
    tokenizers, configs = read_text_parts(out)
    model, prior = load_run(out, Settings, lambda s: build(s, configs), device)
    return model, prior, tokenizers


# ---- Measuring (Tables 1 and 2), drawing (Figures 3 and 4), and the run --------------------------

@torch.no_grad()
def log_prob_of_captions(decoder, captions, z):
    """Its mean in nats; captions: (N, 2, T) tokens, z: (N, D)."""
    pieces = batches({"captions": captions, "z": z}, "nats", 32)
    each = [decoder.log_prob(piece["captions"], piece["z"]) for piece in pieces]
    return torch.cat(each).mean().item()


def caption_nats(model, x):
    """{z given: log p(caption|z) in nats, averaged over the examples x}."""
    z = {}
    if "caption" in model.encoders:
        z["both"] = infer(model, x, ["image", "caption"])
        z["the caption"] = infer(model, x, ["caption"])
    z["the image"] = infer(model, x, ["image"])
    z["another bird's image"] = z["the image"].roll(len(x["image"]) // 2, 0)
    decoder = model.decoders["caption"]
    return {label: {"nats": log_prob_of_captions(decoder, x["caption"], rows)}
            for label, rows in z.items()}


def generate(model, tokenizers, x, n, prior=None, training=None):
    """{label: (pictures, captions)}: x, each from the other (pictures of the first n) and, with the
    prior, from nothing. Supervised only has captions."""
    def picture(z):
        return sample(model.decoders["image"], z)

    def caption(z):
        return spell(tokenizers, sample(model.decoders["caption"], z))

    pictures, captions = x["image"], spell(tokenizers, x["caption"][:, 1])
    pairs = {"real": (pictures, captions)}
    pairs["caption from image"] = pictures, caption(infer(model, x, ["image"]))
    if "image" in model.decoders:
        pairs["image from caption"] = picture(infer(model, x, ["caption"])[:n]), captions[:n]
    if prior is not None:
        for label, z in unconditional(model, prior, training).items():
            pairs[label] = picture(z), caption(z)
    return pairs


def agreement(said, true):
    """Of what each of said, [{factor: value}], has in common with true, the share that is alike."""
    alike = [a[k] == b[k] for a, b in zip(said, true) for k in a.keys() & b.keys()]
    return float(np.mean(alike)) if alike else 0.0


def coherence(pairs, factors):
    """{label: {measure: value}}: the share of the colours named that the picture shows, and of all
    that is said what is true of the real bird."""
    table = {}
    for label, (pictures, captions) in pairs.items():
        said = [parse(caption) for caption in captions]
        row = {"colours": agreement(said, read_colours(pictures))}
        if label in ("real", "caption from image"):
            row["all factors"] = agreement(said, factors)
        table[label] = row
    return table


@torch.no_grad()
def table2(clip, pairs, device):
    """{label: {measure: value}}: CLIP score, 100 cos (Hessel et al. 2021 have 2.5 max(cos, 0)), and
    the Fréchet distance to real pictures among CLIP's features of pictures."""
    clip, words = clip[0].to(device), clip[1]
    side = clip.config.vision_config.image_size
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=device)[..., None, None]

    found = {}
    for label, (pictures, captions) in pairs.items():
        tokens = words(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        images, texts = [], []
        for piece in batches({"image": pictures, **tokens}, "CLIP"):
            pixels = F.interpolate(piece.pop("image"), (side, side), mode="bicubic", antialias=True)
            pixels = ((pixels + 1) / 2 - mean) / std
            images.append(clip.get_image_features(pixels).pooler_output)
            texts.append(clip.get_text_features(**piece).pooler_output)
        found[label] = torch.cat(images), torch.cat(texts)  # (n, d) each
    real, _ = found["real"]
    table = {}
    for label, (image, text) in found.items():
        score = 100 * F.cosine_similarity(image, text).mean().item()
        table[label] = {"CLIP score": score, "Fréchet, CLIP": frechet_distance(image, real)}
    return table


def draw(path, model, tokenizers, x, prior=None, training=None):
    """Figures 3 and 4: generate's rows; at the end, with the prior, four pictures a caption."""
    pairs = generate(model, tokenizers, x, len(x["image"]), prior, training)
    if prior is not None:
        for again in (2, 3, 4):
            pictures = sample(model.decoders["image"], infer(model, x, ["caption"]))
            pairs[f"image from caption ({again})"] = pictures, pairs["real"][1]
    rows = {label: pictures for label, (pictures, _) in pairs.items()}
    captions = {label: texts for label, (_, texts) in pairs.items()}
    save_grid(path, rows, captions, side=128)


def pictures_table(judge, made, real, drawn):
    """judged, and what the judge's captions say of the pictures in made, {label: (pictures,
    captions)}: log p of the captions and, of drawn birds, the share of what both captions name in
    which that of the judge agrees."""
    model, _, tokenizers = judge
    table = judged(model, {label: pictures for label, (pictures, _) in made.items()}, real)
    decoder = model.decoders["caption"]
    for label, (pictures, captions) in made.items():
        z = features(model, pictures)
        tokens = tokenise(tokenizers, captions, decoder.longest).to(z.device)
        table[label]["log p(caption)"] = log_prob_of_captions(decoder, tokens, z)
        if drawn:
            written = [parse(caption) for caption in spell(tokenizers, sample(decoder, z))]
            asked = [parse(caption) for caption in captions]
            table[label]["caption agrees"] = agreement(written, asked)
    return table


def measure(s, model, prior, tokenizers, data, factors, judge, clip):
    """The tables of results.json."""
    test = get_batch(first_captions(data["test"]))
    as_many = slice(min(s.measured, len(test["image"])))
    training = get_batch(data["train"], as_many)
    tables = {"log p of the caption, z given": caption_nats(model, test)}
    pairs = generate(model, tokenizers, test, s.measured, prior, training)
    made = {label: pair for label, pair in pairs.items()
            if label not in ("real", "caption from image")}
    real, _ = pairs["real"]
    if judge is not None:
        others = {}
        if "anew" in data:
            x = get_batch(first_captions(data["anew"]), as_many)
            others["drawn anew"] = x["image"], spell(tokenizers, x["caption"][:, 1])
        table = pictures_table(judge, {**others, **made}, real, factors is not None)
        tables["pictures given"] = table
    if factors is not None:
        tables["coherence"] = coherence(pairs, factors)
    if clip is not None:
        tables["CLIP"] = table2(clip, pairs, s.device)
    return tables


def run(s):
    """Data, both stages of training, samples.png, the tables in results.json."""
    clip, judge = None, None
    if s.clip:
        clip = [pretrained(kind, s.clip) for kind in (hf.CLIPModel, hf.AutoTokenizer)]
    if s.judge:
        check_judge(s)
        judge = load(s.judge, s.device)
    birds = read_birds(s.data, s.size) if s.data else draw_birds(s.size)
    begun = (Path(s.out) / "model.pt").exists()
    if begun:
        tokenizers, configs = read_text_parts(s.out)
    else:
        tokenizers, configs = text_parts(s, [c for ten in birds["train"].captions for c in ten])
        save_text_parts(s.out, tokenizers, configs)
    data = on_device(tensors(birds, tokenizers, s.tokens), s)
    torch.manual_seed(s.seed)
    model, prior = build(s, configs, fresh=not begun)

    def preview(averaged):
        draw(Path(s.out) / "preview.png", averaged, tokenizers, get_batch(data["test"], slice(8)))

    model, prior, seconds = train(s, data, model, prior, get_batch, preview)
    torch.manual_seed(s.seed)
    factors = birds["test"].factors
    tables = measure(s, model, prior, tokenizers, data, factors, judge, clip)
    if s.is_bound:
        tables["Eq. 5"] = nats(model, data["test"], get_batch)
    eight = slice(8)
    x, training = get_batch(first_captions(data["test"]), eight), get_batch(data["train"], eight)
    draw(Path(s.out) / "samples.png", model, tokenizers, x, prior, training)
    save_results(s, {"tables": tables, "seconds": seconds})


if __name__ == "__main__":
    main(run, Settings, __doc__)
