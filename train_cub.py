"""Diff-MVAE on Caltech Birds (§4.1): a bird's image and its caption, each from the other.

    python train_cub.py               draws birds and captions, 32 px: 13 minutes on two cores
    python train_cub.py --data cub    the released data, 64 px, BERT and GPT-2, the paper's settings

New beside train_celeba.py is only a modality: the caption's encoder returns (mu, logvar), its
decoder has log_prob and sample. The same command run again goes on where it stopped.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

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

import train_celeba
from diffmvae import (
    DiffMVAE, InputError, frechet_distance, in_batches, in_bf16, main, option,
    save_grid, save_results, spread,
)
from train_celeba import (
    decoded, image_networks, infer, latent_prior, open_picture, read_table, sample, show, train, unconditional,
)


@dataclass
class Settings(train_celeba.Settings):
    """As for faces, but for these; where data are real, the paper's settings."""

    out: str = option("runs/birds", "folder for checkpoints, numbers and pictures", "runs/cub")
    size: int = option(32, "side of the pictures in pixels", 64)
    steps: int = option(4400, "training steps of Diff-MVAE", 94_000)  # 500 epochs of 5,994 birds
    prior_steps: int = option(4000, "training steps of the latent prior", 10_000)
    batch_size: int = option(8, "examples in a step", 32)
    decoder: str = option("diffusion", "of images; feedforward: baseline MoPoE*",
                          choices=("diffusion", "feedforward"))
    weight: float = option(None, "weight of log p(caption|z) (default: 1 for a bound, or 5)")
    latent_dim: int = option(64, "dimensions of z, an even number", 768)
    channels: int = option(24, "channels of the UNets at their first level", 128)
    multipliers: int = option([1, 2], "their multiple at each level", [1, 2, 2, 4], nargs="+")
    vae_rate: float = option(5e-4, "learning rate of the encoders and the caption's decoder", 5e-5)
    text: str = option("small", "small: words, untrained; pretrained: from --bert and --gpt2",
                       "pretrained", choices=("small", "pretrained"))
    bert: str = option("bert-base-cased", "encoder of the text: name in the hub, or local folder")
    gpt2: str = option("gpt2", "decoder of the text: name in the hub, or local folder")
    optimus: str = option("", "file of Optimus weights to load into these two (§4.1)")
    tokens: int = option(28, "longest caption; what is beyond is cut", 64)
    clip: str = option("", "CLIP for Tables 1 and 2: name in the hub, or local folder")
    judge: ClassVar[str] = ""  # no flag: only faces have Supervised
    surrogate = dict(beta=0.01, weight=5.0)
    free = train_celeba.Settings.free | {"clip"}


# ---- Drawn birds, and captions in varied words from the same factors -----------------------------

BIRDS = {"train": 8_000, "test": 500}
COLOURS = {"black": (25, 25, 30), "white": (246, 246, 242), "grey": (140, 140, 146),
           "brown": (122, 76, 38), "red": (208, 38, 44), "yellow": (242, 208, 48),
           "blue": (48, 88, 205), "green": (58, 152, 70)}
SHAPES = {"short": [(74, -27)], "long": [(94, -27)], "curved": [(76, -32), (82, 6)]}  # of the bill
SIZES = {"small": 0.68, "large": 0.85}
SPOT = {"crown": (78, 37), "bill": (101, 46), "body": (78, 54), "wing": (47, 67), "belly": (63, 81)}
FACTORS = dict.fromkeys(SPOT, COLOURS) | {"shape": SHAPES, "size": SIZES}
NOUNS = {"crown": "crown", "cap": "crown", "bill": "bill", "beak": "bill", "body": "body",
         "throat": "body", "wing": "wing", "wingbar": "wing", "belly": "belly", "breast": "belly"}
OPENINGS = ["this bird has", "a bird that has", "this {} bird has", "this is a {} bird with"]
PHRASE = rf"a (?:({'|'.join(SHAPES)}) )?({'|'.join(COLOURS)}) ({'|'.join(NOUNS)})\b"
GRAMMAR = f"(?:{'|'.join(OPENINGS)}) {PHRASE}(?: , {PHRASE})* and {PHRASE}"
GRAMMAR = GRAMMAR.replace("{}", f"(?:{'|'.join(SIZES)})")


def draw_bird(f, rng, size):
    """Picture (size, size, 3) of a bird with factors f; background, tone and place are rng's."""
    canvas = Image.new("RGB", (128, 128), tuple(rng.integers(200, 241, 3).tolist()))
    pen, shift = ImageDraw.Draw(canvas), rng.integers(-2, 3, 2)
    tone = {k: tuple(int(c * rng.uniform(0.9, 1.03)) for c in COLOURS[f[k]]) for k in SPOT}
    for shape, points, colour, options in [
        *(("line", [(x, 30), (x, 52)], (90, 70, 60), dict(width=3)) for x in (-2, 10)),  # legs
        ("polygon", [(-64, -12), (-30, -8), (-30, 16), (-60, 2)], tone["body"], {}),  # tail
        ("ellipse", [(-40, -18), (28, 34)], tone["body"], {}),
        ("ellipse", [(-22, 6), (26, 36)], tone["belly"], {}),
        ("polygon", [(42, -41), *SHAPES[f["shape"]], (42, -13)], tone["bill"], {}),
        ("ellipse", [(8, -52), (50, -10)], tone["body"], {}),  # head
        ("chord", [(8, -52), (50, -10)], tone["crown"], dict(start=185, end=355)),
        ("ellipse", [(-34, -12), (8, 12)], tone["wing"], {}),
        ("ellipse", [(35, -33), (41, -27)], "black", {}),  # eye
    ]:  # birds of both sizes have the bill in the same place
        points = SIZES[f["size"]] * (np.array(points) - [44, -28]) + [92, 46] + shift
        getattr(pen, shape)([tuple(point) for point in points], fill=colour, **options)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def write_caption(f, rng):
    """A caption that names four or all five of the parts of a bird with factors f."""
    parts = [list(SPOT)[k] for k in sorted(rng.permutation(len(SPOT))[: rng.integers(4, 6)])]
    noun = {k: rng.choice([word for word, part in NOUNS.items() if part == k]) for k in parts}
    phrases = [f"a {f['shape'] + ' ' if k == 'bill' else ''}{f[k]} {noun[k]}" for k in parts]
    opening = str(rng.choice(OPENINGS)).format(f["size"])
    return f"{opening} {' , '.join(phrases[:-1])} and {phrases[-1]}"


def parse(caption):
    """What a caption says: {part: colour}, with the bill's shape and the size where it tells."""
    said = {NOUNS[noun]: colour for _, colour, noun in re.findall(PHRASE, caption)}
    return said | {k: w for k in ("shape", "size") for w in caption.split() if w in FACTORS[k]}


def read_colours(pictures):
    """[{part: colour}] of pictures (N, 3, H, W) in [−1, 1]: the nearest at each part's spot."""
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1  # (8, 3)
    x, y = torch.tensor(list(SPOT.values())).T * pictures.shape[-1] // 128  # (parts,) each
    seen = pictures[:, :, y, x].mT.cpu()  # (N, parts, 3)
    nearest = torch.cdist(seen, palette).argmin(-1).tolist()
    return [dict(zip(SPOT, (list(COLOURS)[k] for k in row))) for row in nearest]


def draw_birds(size):
    """{split: (pictures (N, 3, size, size) uint8, ten captions each, factors)}, always the same."""
    print("These birds are drawn; --data cub takes real ones (see README.md).")
    data = {}
    for seed, (split, n) in enumerate(BIRDS.items()):
        rng = np.random.default_rng(seed)
        factors = [{k: str(rng.choice(list(FACTORS[k]))) for k in FACTORS} for _ in range(n)]
        pictures = [draw_bird(f, rng, size) for f in tqdm(factors, f"drawing birds to {split}")]
        captions = [[write_caption(f, rng) for _ in range(10)] for f in factors]
        data[split] = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), captions, factors
    return data


# ---- CUB as released -----------------------------------------------------------------------------

def read_birds(folder, size):
    """As draw_birds, but without factors; the pictures are decoded once, then cached there."""
    folder = Path(folder)
    root, images = folder / "CUB_200_2011", folder / "CUB_200_2011" / "images"
    texts = folder / ("text" if (folder / "text").exists() else "text_c10")
    for path in (root / "images.txt", root / "train_test_split.txt", images, texts):
        if not path.exists():
            raise InputError(f"{path} is missing: --data needs CUB_200_2011 and text as released")
    names = read_table(root / "images.txt", lambda k, name: (k, name))
    flag = {"1": "train", "0": "test"}
    split_of = read_table(root / "train_test_split.txt", lambda k, i: (k, flag[i]), keys=names)
    captions = []
    for path in ((texts / name).with_suffix(".txt") for name in names.values()):
        text = path.read_text("utf-8", "replace") if path.exists() else ""
        if not (lines := [line.strip() for line in text.splitlines() if line.strip()]):
            raise InputError(f"{path} is missing or holds no caption: unpack the captions again")
        captions.append((lines * 10)[:10])  # where there are fewer than ten they are repeated
    read = lambda name: np.asarray(open_picture(images / name, "RGB").resize((size, size)))
    pictures, data = decoded(folder / f"diffmvae-{size}.pt", read, list(names.values())), {}
    for split in flag.values():
        rows = [row for row, k in enumerate(names) if split_of[k] == split]
        if not rows:
            raise InputError(f"{root / 'images.txt'} lists no picture to {split}: get it anew")
        data[split] = pictures[rows].permute(0, 3, 1, 2), [captions[row] for row in rows], None
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
        mask = (tokens != self.bert.config.pad_token_id)[:, None, None]  # (B, 1, 1, T)
        h = self.bert(tokens, attention_mask=mask).pooler_output
        return self.linear(h).chunk(2, dim=-1)


class TextDecoder(nn.Module):
    """p(caption|z): GPT-2 has z as memory, the key and value of one more position in every layer,
    and in the embedding of every token. Padding is on the right, where no token looks."""

    def __init__(self, gpt2, latent_dim, longest, every_subset):
        super().__init__()
        self.gpt2, self.longest, self.every_subset = gpt2, longest, every_subset
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
    def sample(self, z, top_p=0.0, temperature=1.0):
        """Captions, (B, longest − 1) tokens: greedy, or nucleus sampling (Holtzman et al. 2020)."""
        c, cache, likeliest = self.gpt2.config, self.remember(z), hf.TopPLogitsWarper(top_p)
        token = torch.full((len(z), 1), c.bos_token_id, device=z.device)
        tokens, ended = [], torch.zeros_like(token, dtype=torch.bool)
        while len(tokens) < self.longest - 1 and not ended.all():
            logits = self.logits(token, z, cache)[:, -1] / temperature  # (B, V)
            token = likeliest(None, logits).softmax(-1).multinomial(1)
            tokens.append(token := token.masked_fill(ended, c.pad_token_id))
            ended |= token == c.eos_token_id
        rest = self.longest - 1 - len(tokens)
        return F.pad(torch.cat(tokens, dim=1), (0, rest), value=c.pad_token_id)


def pretrained(kind, name):
    """kind.from_pretrained of a local folder or a name in the hub, or an InputError at once."""
    try:
        files = ["*.json", "*.txt", "*.safetensors"]
        folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=files)
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
        why = " ".join(str(problem).split()[:40])
        raise InputError(f"{name} cannot be had as {kind.__name__} ({why}): give a local folder "
                         "with its files, or connect to the hub") from problem


def load_optimus(path, encoder, decoder):
    """Load Optimus weights into a TextEncoder of BERT and a TextDecoder of GPT-2."""
    ours = {"encoder.linear": "0.linear", "decoder.transformer.linear_emb": "1.embedding",
            "decoder.transformer.linear": "1.memory", "encoder": "0.bert", "decoder": "1.gpt2"}
    try:
        state = torch.load(path, "cpu", weights_only=True)
        state = state.get("model_state_dict", state)
        for theirs, name in ours.items():
            state = {re.sub(rf"^{theirs}\.", f"{name}.", k): v for k, v in state.items()}
        pair = nn.ModuleList([encoder, decoder])
        if missing := pair.load_state_dict(state, strict=False).missing_keys:
            raise ValueError(f"{missing[0]} and {len(missing) - 1} more are missing")
    except Exception as problem:  # not there, damaged, not only weights, of other sizes
        why = " ".join(str(problem).split()[:40])
        raise InputError(f"{path} is not Optimus with this --latent-dim: {why}") from problem


def text_tokenizers(s, captions):
    """BERT's tokenizer and GPT-2's for settings s; small: the words that captions have twice."""
    special = dict(pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>")
    if s.text == "small":
        base = Tokenizer(models.WordLevel(unk_token="<UNK>"))
        base.normalizer, base.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        reserved = [*special.values(), "<UNK>"]
        trainer = trainers.WordLevelTrainer(min_frequency=2, special_tokens=reserved)
        base.train_from_iterator((c for ten in captions for c in ten), trainer)
        return [hf.PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<UNK>", **special)] * 2
    tokenizers = [pretrained(hf.AutoTokenizer, name) for name in (s.bert, s.gpt2)]
    tokenizers[1].add_special_tokens(special)
    return tokenizers


def tokenise(tokenizers, captions, length):
    """N captions as BERT's tokens and GPT-2's, (N, 2, length), padded on the right."""
    options = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ends = [(words.bos_token or "", words.eos_token or "") for words in tokenizers]  # or its own
    both = [words([begin + caption + end for caption in captions], **options)["input_ids"]
            for words, (begin, end) in zip(tokenizers, ends)]
    return torch.stack(both, dim=1)


def spell(tokenizers, tokens):
    """GPT-2's tokens, (N, T), as N captions."""
    return tokenizers[1].batch_decode(tokens, skip_special_tokens=True)


# ---- The two modalities --------------------------------------------------------------------------

def batch(data, i=slice(None)):
    """Examples i as the networks see them, with one of their captions drawn."""
    image, captions = data["image"][i] / 127.5 - 1, data["caption"][i].long()  # (B, 10, 2, T)
    drawn = torch.randint(captions.shape[1], (len(captions), 1, 1, 1), device=captions.device)
    return {"image": image, "caption": captions.take_along_dim(drawn, 1)[:, 0]}  # (B, 2, T)


def text_networks(s, tokenizers):
    """The caption's encoder and decoder for settings s and (BERT's, GPT-2's) tokenizers."""
    words = tokenizers[1]
    special = {f"{k}_token_id": getattr(words, f"{k}_token_id") for k in ("pad", "bos", "eos")}
    if s.text == "small":
        size = dict(vocab_size=len(words), hidden_size=128, intermediate_size=512,
                    num_hidden_layers=2, num_attention_heads=4, initializer_range=128**-0.5)
        size |= dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop",
                               "embd_pdrop", "attn_pdrop"], 0.0)
        bert = hf.BertModel(hf.BertConfig(**size, **special))
        gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(**size, **special))
        for positions in (bert.embeddings.position_embeddings, gpt2.transformer.wpe):
            waves = torch.arange(len(positions.weight))[:, None] / 100 ** torch.linspace(0, 1, 64)
            positions.weight.data = 0.3 * torch.cat([waves.sin(), waves.cos()], dim=1)  # (n, 128)
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
    """The untrained model and latent prior for settings s (§4.1); the prior's UNet is 1-D."""
    if s.latent_dim % 2 or not 2 <= s.tokens <= 512:
        raise InputError(f"--latent-dim {s.latent_dim} must be even, --tokens {s.tokens} 2 to 512")
    pairs = zip(image_networks(s), text_networks(s, tokenizers))
    networks = ({"image": image, "caption": caption} for image, caption in pairs)
    model = DiffMVAE(*networks, s.family, s.beta, {"caption": s.weight})
    return model, latent_prior(s, (s.latent_dim,))


def load(out, device="cpu"):
    """(model, prior, tokenizers) that a finished run left in the folder out."""
    tokenizers = [pretrained(hf.AutoTokenizer, f"{out}/tokenizer-{k}") for k in ("in", "out")]
    settings = lambda **saved: Settings(**saved | {"optimus": ""})  # the weights are in the run
    parts = train_celeba.load(out, device, settings, partial(build, tokenizers=tokenizers))
    return *parts, tokenizers


# ---- Measuring (Tables 1 and 2), drawing (Figures 3 and 4), and the run --------------------------

def caption_nats(model, x):
    """{z given: log p(caption|z) in nats, averaged over the examples x}."""
    given = {"both": ["image", "caption"], "the caption": ["caption"], "the image": ["image"]}
    z = {label: infer(model, x, names) for label, names in given.items()}
    z["another bird's image"] = z["the image"].roll(len(x["image"]) // 2, 0)
    log_prob = lambda rows: [model.decoders["caption"].log_prob(rows["x"], rows["z"])]
    nats = lambda z: in_batches(log_prob, {"x": x["caption"], "z": z}, "nats", 32)[0].mean().item()
    return {label: {"nats": nats(rows)} for label, rows in z.items()}


def generate(model, tokenizers, x, n, prior=None, training=None):
    """{label: (pictures, captions)}: x, each from the other and, with the prior, from nothing."""
    picture = lambda z: sample(model.decoders["image"], z)
    caption = lambda z: spell(tokenizers, sample(model.decoders["caption"], z))
    pictures, captions = x["image"], spell(tokenizers, x["caption"][:, 1])
    pairs = {"real": (pictures, captions),
             "caption from image": (pictures, caption(infer(model, x, ["image"]))),
             "image from caption": (picture(infer(model, x, ["caption"])[:n]), captions[:n])}
    nothing = unconditional(model, prior, training) if prior else {}
    return pairs | {label: (picture(z), caption(z)) for label, z in nothing.items()}


def coherence(pairs, factors):
    """{label: {measure: value}}: the share of the colours named that the picture shows, and of all
    that is said what is true of the real bird; claims per caption; captions within the grammar."""
    known, table = {"real": factors, "caption from image": factors}, {}
    known["real, shuffled"] = np.roll(factors, len(factors) // 2)
    agree = lambda said, true: np.mean(
        [a[k] == b[k] for a, b in zip(said, true) for k in a.keys() & b.keys()] or [0])
    for label, (pictures, captions) in pairs.items():
        said = [parse(caption) for caption in captions]
        row = table[label] = {"colours": agree(said, read_colours(pictures))}
        if label in known:
            row["all factors"] = agree(said, known[label])
        row["claims"] = np.mean([*map(len, said)])
        row["grammatical"] = np.mean([bool(re.fullmatch(GRAMMAR, text)) for text in captions])
    return table


def table2(clip, pairs, device):
    """{label: {measure: value}}: CLIP score, 100 cos (Hessel et al. 2021), and the Fréchet distance
    to real pictures among CLIP's features of pictures."""
    clip, words = clip[0].to(device), clip[1]
    side = clip.config.vision_config.image_size
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=device)[..., None, None]

    def features(x):
        pixels = F.interpolate(x.pop("image"), (side, side), mode="bicubic", antialias=True)
        image = clip.get_image_features(((pixels + 1) / 2 - mean) / std).pooler_output
        return image, clip.get_text_features(**x).pooler_output

    found = {}
    for label, (pictures, captions) in pairs.items():
        tokens = words(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        found[label] = in_batches(features, {"image": pictures, **tokens}, "CLIP")
    real, _ = found["real"]
    return {label: {"CLIP score": 100 * F.cosine_similarity(image, text).mean().item(),
                    "Fréchet, CLIP": frechet_distance(image, real)}
            for label, (image, text) in found.items()}


def draw(path, model, x, prior=None, training=None, tokenizers=None):
    """Figures 3 and 4: generate's rows; at the end, with the prior, four pictures a caption."""
    pairs = generate(model, tokenizers, x, len(x["image"]), prior, training)
    for again in range(2, 5 if prior else 2):
        pictures = sample(model.decoders["image"], infer(model, x, ["caption"]))
        pairs[f"image from caption ({again})"] = pictures, pairs["real"][1]
    rows, captions = ({label: pair[k] for label, pair in pairs.items()} for k in (0, 1))
    save_grid(path, rows, captions, side=128)


def run(s):
    """Data, both stages of training, the tables on the screen, results.json, samples.png."""
    if s.report:
        return show(train_celeba.report(s))
    clip = [pretrained(kind, s.clip) for kind in (hf.CLIPModel, hf.AutoTokenizer) if s.clip]
    birds = read_birds(s.data, s.size) if s.data else draw_birds(s.size)
    tokenizers, data = text_tokenizers(s, birds["train"][1]), {}
    for split, (pictures, captions, _) in birds.items():
        tokens = tokenise(tokenizers, [c for ten in captions for c in ten], s.tokens).to(s.device)
        data[split] = {"image": pictures.to(s.device), "caption": tokens.unflatten(0, (-1, 10))}
    pair, sheet = build(s, tokenizers), partial(draw, tokenizers=tokenizers)
    model, prior, seconds = train(s, data["train"], pair, batch, sheet)
    for k, words in zip(("in", "out"), tokenizers):
        words.save_pretrained(f"{s.out}/tokenizer-{k}")
    torch.manual_seed(s.seed)
    test = batch(data["test"] | {"caption": data["test"]["caption"][:, :1]})
    training = batch(data["train"], slice(s.measured))
    pairs = generate(model, tokenizers, test, s.measured, prior, training)
    made = {label: pair for label, pair in pairs.items() if label != "caption from image"}
    pictures, captions = pairs["real"]
    pairs["real, shuffled"] = pictures.roll(len(pictures) // 2, 0), captions  # CUB's kinds in order
    tables = {"log p of the caption, z given": caption_nats(model, test)}
    if factors := birds["test"][2]:
        tables["coherence"] = coherence(pairs, factors)
    if clip:
        tables["CLIP"] = table2(clip, pairs, s.device)
    show(tables)
    x, training = ({name: v[:8] for name, v in part.items()} for part in (test, training))
    sheet(Path(s.out) / "samples.png", model, x, prior, training)
    save_results(s, {"tables": tables, "seconds": seconds})
    if s.export:
        train_celeba.export(s.export, made)


if __name__ == "__main__":
    main(run, Settings, __doc__)
