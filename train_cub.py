"""Diff-MVAE on Caltech Birds (§4.1): a bird's image and its caption, each from the other.

    python train_cub.py               draws birds and captions, 32 px: 13 minutes on two cores
    python train_cub.py --data cub    the released data, 64 px, BERT and GPT-2, the paper's settings
    python train_cub.py --data cub --small    32 px and small text models, an hour on one core

New beside train_celeba.py is only a modality: the caption's encoder returns (mu, logvar), its
decoder has log_prob and sample. The same command run again goes on where it stopped.
"""

import argparse
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import diffmvae
from diffmvae import (
    InputError, decoded, export, frechet_distance, image_networks, in_batches, in_bf16, infer,
    latent_prior, load_run, main, multimodal, nats, on_device, open_picture, option, prepare,
    read_lines, read_table, sample, save_grid, save_results, show, spread, train, unconditional,
    why,
)


@dataclass
class Settings(diffmvae.Settings):
    """Drawn birds train in minutes on a CPU; for real ones defaults are the paper's,
    but for --small."""

    out: str = option("folder for checkpoints, numbers and pictures", "runs/birds", "runs/cub",
                      small="runs/cub-small")
    size: int = option("side of the pictures in pixels", 32, 64, least=1)
    # Of CUB's 5,994 birds to train on 94,000 steps of 32 are 500 epochs, 20,000 of 8 are 27.
    steps: int = option("training steps of Diff-MVAE", 4400, 94_000, small=20_000, least=1)
    batch_size: int = option("examples in a step", 8, 32, least=1)
    weight: float = option("weight of log p(caption|z) (default: 1 for a bound, or 5)", None)
    latent_dim: int = option("dimensions of z, an even number", 64, 768, least=1)
    channels: int = option("channels of the UNet at its first level", 24, 128, least=1)
    multipliers: list = option("their multiple at each level", [1, 2], [1, 2, 2, 4], least=1,
                               nargs="+", type=int)
    vae_rate: float = option("learning rate of the encoders and of the caption's decoder", 5e-4,
                             5e-5)
    text: str = option("small: words, untrained; pretrained: from --bert and --gpt2", "small",
                       "pretrained", choices=("small", "pretrained"))
    bert: str = option("encoder of the text: name in the hub, or local folder", "bert-base-cased")
    gpt2: str = option("decoder of the text: name in the hub, or local folder", "gpt2")
    optimus: str = option("file of Optimus weights to load into these two (§4.1)", "")
    tokens: int = option("longest caption; what is beyond is cut", 28, 64, small=32, least=3,
                         most=512)
    clip: str = option("CLIP for Tables 1 and 2: name in the hub, or local folder", "")

    free = (*diffmvae.Settings.free, "clip")
    surrogate_weight = 5.0


# ---- Drawn birds, and captions in varied words from the same factors -----------------------------

class Birds(NamedTuple):
    """The birds of a split, drawn or real."""

    pictures: torch.Tensor  # (N, 3, size, size) uint8
    captions: list  # ten for each bird
    factors: list  # {factor: value} for each bird, or None of real ones


BIRDS = {"train": 8_000, "test": 500}
COLOURS = {"black": (25, 25, 30), "white": (246, 246, 242), "grey": (140, 140, 146),
           "brown": (122, 76, 38), "red": (208, 38, 44), "yellow": (242, 208, 48),
           "blue": (48, 88, 205), "green": (58, 152, 70)}
SHAPES = {"short": [(74, -27)], "long": [(94, -27)], "curved": [(76, -32), (82, 6)]}  # of the bill
SIZES = {"small": 0.68, "large": 0.85}
SPOT = {"crown": (78, 37), "bill": (101, 46), "body": (78, 54), "wing": (47, 67), "belly": (63, 81)}
FACTORS = {**dict.fromkeys(SPOT, COLOURS), "shape": SHAPES, "size": SIZES}
NOUNS = {"crown": "crown", "cap": "crown", "bill": "bill", "beak": "bill", "body": "body",
         "throat": "body", "wing": "wing", "wingbar": "wing", "belly": "belly", "breast": "belly"}
OPENINGS = ["this bird has", "a bird that has", "this {} bird has", "this is a {} bird with"]
PHRASE = rf"a (?:({'|'.join(SHAPES)}) )?({'|'.join(COLOURS)}) ({'|'.join(NOUNS)})\b"
GRAMMAR = f"(?:{'|'.join(OPENINGS)}) {PHRASE}(?: , {PHRASE})* and {PHRASE}"
GRAMMAR = GRAMMAR.replace("{}", f"(?:{'|'.join(SIZES)})")


def draw_bird(f, rng, size):
    """Picture (size, size, 3) of a bird with factors f; background, tone and place are rng's."""
    canvas = Image.new("RGB", (128, 128), tuple(rng.integers(200, 241, 3).tolist()))
    pen = ImageDraw.Draw(canvas)
    shift = rng.integers(-2, 3, 2)
    tone = {k: tuple(int(c * rng.uniform(0.9, 1.03)) for c in COLOURS[f[k]]) for k in SPOT}

    def add(shape, points, colour, **options):
        """Both sizes of birds have the bill in the same place."""
        points = SIZES[f["size"]] * (np.array(points) - [44, -28]) + [92, 46] + shift
        shape([tuple(point) for point in points], fill=colour, **options)

    for x in (-2, 10):  # legs
        add(pen.line, [(x, 30), (x, 52)], (90, 70, 60), width=3)
    add(pen.polygon, [(-64, -12), (-30, -8), (-30, 16), (-60, 2)], tone["body"])  # tail
    add(pen.ellipse, [(-40, -18), (28, 34)], tone["body"])
    add(pen.ellipse, [(-22, 6), (26, 36)], tone["belly"])
    add(pen.polygon, [(42, -41), *SHAPES[f["shape"]], (42, -13)], tone["bill"])
    add(pen.ellipse, [(8, -52), (50, -10)], tone["body"])  # head
    add(pen.chord, [(8, -52), (50, -10)], tone["crown"], start=185, end=355)
    add(pen.ellipse, [(-34, -12), (8, 12)], tone["wing"])
    add(pen.ellipse, [(35, -33), (41, -27)], "black")  # eye
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
    """{split: Birds}, the same at every run."""
    print("These birds are drawn; --data cub takes real ones (see README.md).")
    data = {}
    for seed, (split, n) in enumerate(BIRDS.items()):
        rng = np.random.default_rng(seed)
        factors = [{k: str(rng.choice(list(FACTORS[k]))) for k in FACTORS} for _ in range(n)]
        pictures = [draw_bird(f, rng, size) for f in tqdm(factors, f"drawing birds to {split}")]
        captions = [[write_caption(f, rng) for _ in range(10)] for f in factors]
        pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        data[split] = Birds(pictures, captions, factors)
    return data


# ---- CUB as released -----------------------------------------------------------------------------

def read_captions(path):
    """The lines of a file that are not empty; none where there is no file."""
    if not path.exists():
        return []
    return [line.strip() for line in read_lines(path) if line.strip()]


def read_birds(folder, size, gaps=False):
    """As draw_birds, but without factors; the pictures are decoded once, then cached there. With
    gaps, a bird may have no captions."""
    folder = Path(folder)
    root, images = folder / "CUB_200_2011", folder / "CUB_200_2011" / "images"
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
    captions = []
    for name in names.values():
        path = (texts / name).with_suffix(".txt")
        lines = read_captions(path)
        if not lines and not gaps:
            raise InputError(f"{path} is missing or holds no caption: unpack the captions again, "
                             "or allow it by --gaps")
        captions.append((lines * 10)[:10])  # ten: fewer are repeated, more are cut

    def read(name):
        return np.asarray(open_picture(images / name, "RGB").resize((size, size)))

    pictures = decoded(folder / f"diffmvae-{size}.pt", read, list(names.values()))
    data = {}
    for split in ("train", "test"):
        rows = [row for row, k in enumerate(names) if split_of[k] == split]
        if not rows:
            raise InputError(f"{root / 'images.txt'} lists no picture to {split}: get it anew")
        of_split = [captions[row] for row in rows]
        data[split] = Birds(pictures[rows].permute(0, 3, 1, 2), of_split, None)
    return data


# ---- Text VAE: in through BERT, out through GPT-2, as Optimus (Li et al. 2020) -------------------

class TextEncoder(nn.Module):
    """q(z|caption): (B, 2, T) tokens, of which BERT reads [:, 0] -> (mu, logvar), each (B, D)."""

    def __init__(self, bert, latent_dim):
        super().__init__()
        self.bert = bert
        bert.set_attn_implementation("sdpa")  # whose mask is bool
        self.linear = spread(nn.Linear(bert.config.hidden_size, 2 * latent_dim, bias=False))

    def forward(self, tokens):
        tokens = tokens[:, 0]
        mask = tokens != self.bert.config.pad_token_id  # (B, T)
        mask[:, 0] = True  # always [CLS]; and no caption at all, a gap, has something to attend to
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
    """kind.from_pretrained of a local folder or a name in the hub, or an InputError at once."""
    try:
        folder = name
        if not Path(name).is_dir():
            files = ["*.json", "*.txt", "*.safetensors"]
            folder = snapshot_download(name, allow_patterns=files)
        if kind is hf.AutoTokenizer:
            found = kind.from_pretrained(folder)
            missing = len(found) <= len(found.all_special_ids)
        else:
            found, info = kind.from_pretrained(folder, output_loading_info=True)
            missing = set(info["missing_keys"]) - {"lm_head.weight"}  # which is tied
        if missing:
            raise ValueError("its words or weights are missing")
        return found
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
    except pickle.UnpicklingError as problem:
        raise InputError(f"{path} is damaged or holds code, which is not executed: give a file of "
                         "Optimus weights") from problem
    except Exception as problem:  # not there, or not of torch, which has no class for that
        raise InputError(f"{path} cannot be loaded ({why(problem)}): give a file of Optimus "
                         "weights") from problem
    if isinstance(state, dict):
        state = state.get("model_state_dict", state)
    if not isinstance(state, dict):
        raise InputError(f"{path} is no file of Optimus: it holds no named weights")
    renamed = {}
    for key, value in state.items():
        key = str(key).removeprefix("module.")
        for theirs, name in ours.items():
            key = re.sub(rf"^{re.escape(theirs)}\.", f"{name}.", key)
        renamed[key] = value
    pair = nn.ModuleList([encoder, decoder])
    try:
        missing = pair.load_state_dict(renamed, strict=False).missing_keys
    except RuntimeError as problem:  # of other sizes
        raise InputError(f"{path} does not fit, perhaps not this --latent-dim "
                         f"({why(problem)})") from problem
    if missing:
        raise InputError(f"{path} is no file of Optimus: {missing[0]} and {len(missing) - 1} more "
                         "are missing")


def word_tokenizer(captions):
    """A tokenizer of the lower-case words that captions have at least twice."""
    special = {"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"}
    base = Tokenizer(models.WordLevel(unk_token="<UNK>"))
    base.normalizer = normalizers.Lowercase()
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    reserved = [*special.values(), "<UNK>"]
    base.train_from_iterator(captions, trainers.WordLevelTrainer(min_frequency=2,
                                                                 special_tokens=reserved))
    return hf.PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<UNK>", **special)


def text_tokenizers(s, captions):
    """BERT's tokenizer and GPT-2's, those of the run if it has begun; small: one of the words."""
    if (Path(s.out) / "model.pt").exists():
        return run_tokenizers(s.out)
    if s.text == "small":
        words = word_tokenizer(captions)
        if len(words) == len(words.all_special_ids):
            raise InputError("no word is twice in the captions: --text small needs such words")
        return [words, words]
    tokenizers = [pretrained(hf.AutoTokenizer, name) for name in (s.bert, s.gpt2)]
    tokenizers[1].add_special_tokens({"pad_token": "<PAD>", "bos_token": "<BOS>",
                                      "eos_token": "<EOS>"})
    return tokenizers


def run_tokenizers(out):
    """The two that are part of a run."""
    tokenizers = []
    for end in ("in", "out"):
        folder = Path(out) / f"tokenizer-{end}"
        if not folder.is_dir():  # and never from the hub
            raise InputError(f"{folder}, part of that run, is missing: change --out")
        tokenizers.append(pretrained(hf.AutoTokenizer, str(folder)))
    return tokenizers


def tokenise(tokenizers, captions, length):
    """N captions as BERT's tokens and GPT-2's, (N, 2, length), padded on the right.

    Too long ones lose words, never their end. What looks like a special token is text.
    """
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
    """Birds of draw_birds or read_birds as {split: {modality: (N, ...)}}; and which of them have
    captions, {split: {"caption": (N,) bool}}."""
    data, observed = {}, {}
    for split, part in birds.items():
        filled = [ten if ten else [""] * 10 for ten in part.captions]
        flat = [caption for ten in filled for caption in ten]
        tokens = tokenise(tokenizers, flat, length)  # (10 N, 2, length)
        data[split] = {"image": part.pictures, "caption": tokens.unflatten(0, (-1, 10))}
        observed[split] = {"caption": torch.tensor([len(ten) > 0 for ten in part.captions])}
    return data, observed


def batch(data, i=slice(None)):
    """Examples i as the networks see them, with one of their captions drawn."""
    captions = data["caption"][i].long()  # (B, 10, 2, T)
    drawn = torch.randint(captions.shape[1], (len(captions), 1, 1, 1), device=captions.device)
    caption = captions.take_along_dim(drawn, 1)[:, 0]  # (B, 2, T)
    return {"image": data["image"][i] / 127.5 - 1, "caption": caption}


def small_text_models(special, num_words):
    """BERT and GPT-2 of two layers, untrained, but for positions, which start as sinusoids in the
    manner of Vaswani et al. (2017): by them neighbours find each other sooner.

    special: {"pad_token_id": …}.
    """
    sizes = {"vocab_size": num_words, "hidden_size": 128, "intermediate_size": 512,
             "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 128**-0.5,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    bert = hf.BertModel(hf.BertConfig(**sizes, **special))
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **special))
    for positions in (bert.embeddings.position_embeddings, gpt2.transformer.wpe):
        n = len(positions.weight)
        waves = torch.arange(n)[:, None] / 100 ** torch.linspace(0, 1, 64)  # (n, 64)
        positions.weight.data = 0.3 * torch.cat([waves.sin(), waves.cos()], dim=1)  # (n, 128)
    return bert, gpt2


def text_networks(s, tokenizers):
    """The caption's encoder and decoder for settings s and (BERT's, GPT-2's) tokenizers."""
    words = tokenizers[1]
    special = {f"{k}_token_id": getattr(words, f"{k}_token_id") for k in ("pad", "bos", "eos")}
    if s.text == "small":
        bert, gpt2 = small_text_models(special, len(words))
    else:
        bert, gpt2 = pretrained(hf.BertModel, s.bert), pretrained(hf.GPT2LMHeadModel, s.gpt2)
        gpt2.resize_token_embeddings(len(words))
        gpt2.config.update(special)
    encoder = TextEncoder(bert, s.latent_dim)
    decoder = TextDecoder(gpt2, s.latent_dim, s.tokens, every_subset=s.text == "small")
    if s.optimus:
        load_optimus(s.optimus, encoder, decoder)
    return encoder, decoder


def build(s, tokenizers):
    """The untrained model and latent prior for settings s (§4.1)."""
    if s.latent_dim % 2:
        raise InputError(f"--latent-dim {s.latent_dim}: give an even number")
    image_encoder, image_decoder = image_networks(s)
    text_encoder, text_decoder = text_networks(s, tokenizers)
    encoders = {"image": image_encoder, "caption": text_encoder}
    decoders = {"image": image_decoder, "caption": text_decoder}
    model = multimodal(s, encoders, decoders, {"caption": s.weight})
    return model, latent_prior(s, (s.latent_dim,))


def load(out, device="cpu"):
    """(model, prior, tokenizers) that a finished run left in the folder out."""
    tokenizers = run_tokenizers(out)

    def settings(**saved):
        saved["optimus"] = ""  # those weights are in the run's
        return Settings(**saved)

    model, prior = load_run(out, settings, lambda s: build(s, tokenizers), device)
    return model, prior, tokenizers


# ---- Measuring (Tables 1 and 2), drawing (Figures 3 and 4), and the run --------------------------

def caption_nats(model, x):
    """{z given: log p(caption|z) in nats, averaged over the examples x}."""
    z = {
        "both": infer(model, x, ["image", "caption"]),
        "the caption": infer(model, x, ["caption"]),
        "the image": infer(model, x, ["image"]),
    }
    z["another bird's image"] = z["the image"].roll(len(x["image"]) // 2, 0)

    def log_prob(rows):
        return [model.decoders["caption"].log_prob(rows["caption"], rows["z"])]

    table = {}
    for label, rows in z.items():
        (each,) = in_batches(log_prob, {"caption": x["caption"], "z": rows}, "nats", 32)
        table[label] = {"nats": each.mean().item()}
    return table


def generate(model, tokenizers, x, n, prior=None, training=None):
    """{label: (pictures, captions)}: x, each from the other (pictures of the first n) and, with the
    prior, from nothing."""
    def picture(z):
        return sample(model.decoders["image"], z)

    def caption(z):
        return spell(tokenizers, sample(model.decoders["caption"], z))

    pictures, captions = x["image"], spell(tokenizers, x["caption"][:, 1])
    pairs = {"real": (pictures, captions)}
    pairs["caption from image"] = pictures, caption(infer(model, x, ["image"]))
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
    that is said what is true of the real bird; claims per caption; captions within the grammar."""
    shuffled = np.roll(factors, len(factors) // 2)
    known = {"real": factors, "caption from image": factors, "real, shuffled": shuffled}
    table = {}
    for label, (pictures, captions) in pairs.items():
        said = [parse(caption) for caption in captions]
        row = {"colours": agreement(said, read_colours(pictures))}
        if label in known:
            row["all factors"] = agreement(said, known[label])
        row["claims"] = float(np.mean([len(claims) for claims in said]))
        matches = [re.fullmatch(GRAMMAR, caption) is not None for caption in captions]
        row["grammatical"] = float(np.mean(matches))
        table[label] = row
    return table


def table2(clip, pairs, device):
    """{label: {measure: value}}: CLIP score, 100 cos (Hessel et al. 2021 have 2.5 max(cos, 0)), and
    the Fréchet distance to real pictures among CLIP's features of pictures."""
    clip, words = clip[0].to(device), clip[1]
    side = clip.config.vision_config.image_size
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=device)[..., None, None]

    def features(x):
        """Of pictures and captions, each (B, d)."""
        pixels = F.interpolate(x.pop("image"), (side, side), mode="bicubic", antialias=True)
        image = clip.get_image_features(((pixels + 1) / 2 - mean) / std).pooler_output
        return image, clip.get_text_features(**x).pooler_output

    found = {}
    for label, (pictures, captions) in pairs.items():
        tokens = words(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        found[label] = in_batches(features, {"image": pictures, **tokens}, "CLIP")
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


def measure(s, model, prior, tokenizers, clip, test, training, factors):
    """The tables, and the pictures made for them, {label: (n, 3, H, W)}."""
    pairs = generate(model, tokenizers, test, s.measured, prior, training)
    made = {label: pictures for label, (pictures, _) in pairs.items()}
    del made["caption from image"]  # which are real
    pictures, captions = pairs["real"]
    pairs["real, shuffled"] = pictures.roll(len(pictures) // 2, 0), captions  # CUB's kinds in order
    tables = {"log p of the caption, z given": caption_nats(model, test)}
    if factors is not None:
        tables["coherence"] = coherence(pairs, factors)
    if clip:
        tables["CLIP"] = table2(clip, pairs, s.device)
    return tables, made


def run(s):
    """Data, both stages of training, the tables on the screen, results.json, samples.png."""
    clip = []
    if s.clip:
        clip = [pretrained(kind, s.clip) for kind in (hf.CLIPModel, hf.AutoTokenizer)]
    birds = read_birds(s.data, s.size, s.gaps) if s.data else draw_birds(s.size)
    captions = [caption for ten in birds["train"].captions for caption in ten]
    tokenizers = text_tokenizers(s, captions)
    if not (Path(s.out) / "model.pt").exists():  # from then on they stay as they are
        for end, words in zip(("in", "out"), tokenizers):
            words.save_pretrained(f"{s.out}/tokenizer-{end}")
    data, observed = tensors(birds, tokenizers, s.tokens)
    data, observed, whole = prepare(s, data, observed, ["caption"])
    model, prior = build(s, tokenizers)

    def preview(averaged):
        eight = {name: x[:8] for name, x in data["test"].items()}
        draw(Path(s.out) / "preview.png", averaged, tokenizers, batch(eight))

    model, prior, seconds = train(s, data, observed, model, prior, batch, preview)
    torch.manual_seed(s.seed)
    test = batch({**data["test"], "caption": data["test"]["caption"][:, :1]})
    n = min(s.measured, len(test["image"]))
    training = on_device(batch(whole, slice(n)), s)
    tables, made = measure(s, model, prior, tokenizers, clip, test, training, birds["test"].factors)
    if s.is_bound:
        tables["Eq. 5"] = nats(model, data["test"], batch)
    save_results(s, {"tables": tables, "seconds": seconds})
    x, some = ({name: v[:8] for name, v in part.items()} for part in (test, training))
    draw(Path(s.out) / "samples.png", model, tokenizers, x, prior, some)
    show(tables)
    if s.export:
        export(s.export, made)


if __name__ == "__main__":
    main(run, Settings, __doc__)
