"""Diff-MVAE on Caltech Birds (§4.1): a bird's image and its caption, each from the other.

    python train_cub.py               draws birds and captions, 32 px: twelve minutes on a CPU core
    python train_cub.py --data cub    the released data, 64 px, BERT and GPT-2, the paper's settings

New beside train_celeba.py is only a modality: the caption's encoder returns (mu, logvar), its
decoder has log_prob and sample. The same command run again goes on where it stopped.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from huggingface_hub import model_info
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import train_celeba
from diffmvae import (
    DiffMVAE, InputError, LatentPrior, UNet, frechet_distance, in_batches, in_bf16, main, option,
    save_checkpoint, save_grid, save_results,
)
from train_celeba import image_networks, infer, open_picture, train

TOKENIZERS = "tokenizer-in", "tokenizer-out"  # BERT's and GPT-2's, folders of a finished run


@dataclass
class Settings(train_celeba.Settings):
    """As for faces, but for these; where data are real, the paper's settings."""

    out: str = option("runs/birds", "folder for checkpoints, numbers and pictures", "runs/cub")
    size: int = option(32, "side of the pictures in pixels", 64)
    steps: int = option(3000, "training steps of Diff-MVAE", 94_000)  # 500 epochs of 5,994 birds
    batch_size: int = option(8, "examples in a step", 32)
    weight: float = option(None, "weight of log p(caption|z) (default: 1 for a bound, or 5)")
    latent_dim: int = option(64, "dimensions of z, an even number", 768)
    channels: int = option(24, "channels of the UNet at its first level", 128)
    multipliers: int = option([1, 2], "their multiple at each level", [1, 2, 2, 4], nargs="+")
    vae_rate: float = option(5e-4, "learning rate of all but the image's decoder", 5e-5)
    text: str = option("small", "small: words, untrained; pretrained: from --bert and --gpt2",
                       "pretrained", choices=("small", "pretrained"))
    bert: str = option("bert-base-cased", "encoder of the text: name in the hub, or local folder")
    gpt2: str = option("gpt2", "decoder of the text: name in the hub, or local folder")
    optimus: str = option("", "file of Optimus weights to load into these two (§4.1)")
    tokens: int = option(26, "longest caption; what is beyond is cut", 64)
    measured: int = option(128, "pictures generated of each kind for the tables", 6000)
    clip: str = option("", "CLIP for Tables 1 and 2: name in the hub, or local folder")

    surrogate = dict(beta=0.01, weight=5.0)
    free = {"out", "device", "measured", "clip"}


# ---- Drawn birds, and captions in varied words from the same factors -----------------------------

BIRDS = {"train": 8_000, "test": 500}
COLOURS = {"black": (25, 25, 30), "white": (246, 246, 242), "grey": (140, 140, 146),
           "brown": (122, 76, 38), "red": (208, 38, 44), "yellow": (242, 208, 48),
           "blue": (48, 88, 205), "green": (58, 152, 70)}
SHAPES = {"short": [(70, -27)], "long": [(88, -27)], "curved": [(72, -31), (78, 4)]}  # of the bill
SIZES = {"small": 0.68, "large": 0.85}
NOUNS = {"crown": ("crown", "cap"), "bill": ("bill", "beak"), "body": ("body", "throat"),
         "wing": ("wings", "secondaries"), "belly": ("belly", "breast")}
FACTORS = dict.fromkeys(NOUNS, COLOURS) | {"shape": SHAPES, "size": SIZES}
SPOTS = {"crown": (28, -38), "bill": (55, -28), "body": (28, -18), "wing": (-8, -3),
         "belly": (10, 14)}  # where a large bird and a small one have the part
OPENINGS = ["this bird has", "the bird has", "a bird that has", "this {} bird has",
            "a {} bird with", "this is a {} bird with"]


def place(points, size):
    """Points of the bird on the canvas of 128 px, where birds of both sizes have the same beak."""
    return np.array([92, 46]) + SIZES[size] * (np.array(points) - [44, -28])


def draw_bird(f, rng, size):
    """Picture (size, size, 3) of a bird with factors f; background, tone and place are rng's."""
    canvas = Image.new("RGB", (128, 128), tuple(rng.integers(60, 226, 3).tolist()))
    pen, shift, legs = ImageDraw.Draw(canvas), rng.integers(-2, 3, 2), (90, 70, 60)
    tone = {k: tuple(int(c * rng.uniform(0.9, 1.03)) for c in COLOURS[f[k]]) for k in NOUNS}
    for shape, points, colour, options in [
        ("line", [(-2, 30), (-2, 52)], legs, dict(width=3)),
        ("line", [(10, 30), (10, 52)], legs, dict(width=3)),
        ("polygon", [(-64, -12), (-30, -8), (-30, 16), (-60, 2)], tone["body"], {}),  # tail
        ("ellipse", [(-40, -18), (28, 34)], tone["body"], {}),
        ("ellipse", [(-22, 6), (26, 36)], tone["belly"], {}),
        ("polygon", [(42, -41), *SHAPES[f["shape"]], (42, -13)], tone["bill"], {}),
        ("ellipse", [(8, -52), (50, -10)], tone["body"], {}),  # head
        ("chord", [(8, -52), (50, -10)], tone["crown"], dict(start=185, end=355)),
        ("ellipse", [(-34, -12), (8, 12)], tone["wing"], {}),
        ("ellipse", [(34, -34), (42, -26)], "white", {}),
        ("ellipse", [(36, -32), (41, -27)], "black", {}),
    ]:
        box = [tuple(point) for point in place(points, f["size"]) + shift]
        getattr(pen, shape)(box, fill=colour, **options)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def write_caption(f, rng):
    """A caption that names two to four parts of a bird with factors f."""
    phrases = []
    for k in sorted(rng.permutation(len(NOUNS))[: rng.integers(2, 5)]):
        part = list(NOUNS)[k]
        words = [f["shape"]] * (part == "bill") + [f[part], str(rng.choice(NOUNS[part]))]
        phrases.append("a " * (part != "wing") + " ".join(words))
    opening = str(rng.choice(OPENINGS)).format(f["size"])
    return f"{opening} {' , '.join(phrases[:-1])} and {phrases[-1]}"


COLOUR, SHAPE, SIZE = (f"(?:{'|'.join(words)})" for words in (COLOURS, SHAPES, SIZES))
NOUN = {part: f"(?:{'|'.join(words)})" for part, words in NOUNS.items()}
SAYS = {part: f"({COLOUR}) {noun}" for part, noun in NOUN.items()}
SAYS |= {"shape": f"({SHAPE}) {COLOUR}", "size": f"({SIZE})"}
PLAIN = "|".join(NOUN[part] for part in ("body", "belly", "crown"))
PHRASE = f"(?:a {COLOUR} (?:{PLAIN})|{COLOUR} {NOUN['wing']}|a {SHAPE} {COLOUR} {NOUN['bill']})"
GRAMMAR = f"(?:{'|'.join(OPENINGS)}) {PHRASE}(?: , {PHRASE})* and {PHRASE}".replace("{}", SIZE)


def parse(caption):
    """What a caption says: {part: colour}, with the bill's shape and the size where it tells."""
    found = {factor: re.search(pattern, caption) for factor, pattern in SAYS.items()}
    return {factor: match[1] for factor, match in found.items() if match}


def read_colours(pictures):
    """[{part: colour}] of pictures (N, 3, H, W) in [−1, 1]: the nearest at each part's spot."""
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1  # (8, 3)
    pixels = (place(list(SPOTS.values()), "large") * pictures.shape[-1] / 128).astype(int)
    seen = torch.stack([pictures[:, :, y, x].cpu() for x, y in pixels], dim=1)  # (N, parts, 3)
    nearest = torch.cdist(seen, palette).argmin(-1).tolist()
    return [dict(zip(SPOTS, (list(COLOURS)[k] for k in row))) for row in nearest]


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
    root, cache = folder / "CUB_200_2011", folder / f"diffmvae-{size}.pt"
    texts = folder / ("text" if (folder / "text").exists() else "text_c10")
    for path in (root / "images.txt", root / "train_test_split.txt", root / "images", texts):
        if not path.exists():
            raise InputError(f"{path} is missing: --data needs CUB_200_2011 and text as released")
    table = lambda name: dict(line.split() for line in (root / name).read_text().splitlines())
    names, training = table("images.txt"), table("train_test_split.txt")
    captions = []
    for path in ((texts / name).with_suffix(".txt") for name in names.values()):
        text = path.read_text("utf-8", "replace") if path.exists() else ""
        if not (lines := [line.strip() for line in text.splitlines() if line.strip()]):
            raise InputError(f"{path} is missing or holds no caption: unpack the captions again")
        captions.append((lines * 10)[:10])  # where there are fewer than ten they are repeated
    saved = torch.load(cache, weights_only=True) if cache.exists() else {}
    if saved.get("names") != names:
        read = lambda name: open_picture(root / "images" / name, "RGB").resize((size, size))
        with ThreadPoolExecutor() as pool:
            decoded = list(tqdm(pool.map(read, names.values()), "decoding birds", len(names)))
        pictures = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
        saved = {"names": names, "pictures": pictures}
        save_checkpoint(cache, saved)
    data = {}
    for split, flag in (("train", "1"), ("test", "0")):
        rows = [row for row, k in enumerate(names) if training[k] == flag]
        data[split] = saved["pictures"][rows], [captions[row] for row in rows], None
    return data


# ---- Text VAE: in through BERT, out through GPT-2, as Optimus (Li et al. 2020) -------------------

class TextEncoder(nn.Module):
    """q(z|caption): (B, 2, T) tokens, of which BERT reads [:, 0] -> (mu, logvar), each (B, D)."""

    def __init__(self, bert, latent_dim):
        super().__init__()
        self.bert = bert
        self.linear = nn.Linear(bert.config.hidden_size, 2 * latent_dim, bias=False)

    def forward(self, tokens):
        tokens = tokens[:, 0]
        h = self.bert(tokens, attention_mask=(tokens != self.bert.config.pad_token_id).long())
        return self.linear(h.pooler_output).chunk(2, dim=-1)


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
        """The last hidden states of tokens (B, T), (B, T, n_embd); cache holds what comes before."""
        inputs = self.gpt2.transformer.wte(tokens) + self.embedding(z)[:, None]  # (B, T, n_embd)
        output = self.gpt2.transformer(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        return output.last_hidden_state

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
        """Captions in GPT-2's tokens, (B, longest − 1): greedy, or drawn from the likeliest tokens
        that hold a mass of top_p (Holtzman et al. 2020)."""
        c, cache = self.gpt2.config, self.remember(z)
        token = torch.full((len(z), 1), c.bos_token_id, device=z.device)
        tokens, ended = [], torch.zeros_like(token, dtype=torch.bool)
        while len(tokens) < self.longest - 1 and not ended.all():
            p = (self.logits(token, z, cache)[:, -1] / temperature).softmax(-1)
            p, order = p.sort(descending=True)  # (B, V)
            p = p * (p.cumsum(-1) - p <= top_p)  # the likeliest always stays
            token = order.gather(1, p.multinomial(1)).masked_fill(ended, c.pad_token_id)
            ended |= token == c.eos_token_id
            tokens.append(token)
        rest = self.longest - 1 - len(tokens)
        return F.pad(torch.cat(tokens, dim=1), (0, rest), value=c.pad_token_id)


def pretrained(kind, name):
    """kind.from_pretrained of a local folder or a name in the hub, or an InputError at once."""
    for local in (True, False):
        try:
            if not local:
                model_info(name, timeout=10)  # fails at once, where from_pretrained tries for long
            if kind is hf.AutoTokenizer:
                found = kind.from_pretrained(name, local_files_only=local)
                missing = len(found) <= len(found.all_special_ids)
            else:
                options = dict(local_files_only=local, output_loading_info=True)
                found, info = kind.from_pretrained(name, **options)
                missing = set(info["missing_keys"]) - {"lm_head.weight"}  # which is tied
            if not missing:
                return found
            raise ValueError("its words or weights are missing")
        except Exception as problem:  # the hub's errors have no class in common
            if not local or Path(name).exists():
                raise InputError(f"{name} cannot be had as {kind.__name__} ({problem}): give a local "
                                 "folder with its files, or connect to the hub") from problem


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
    """(BERT's tokenizer, GPT-2's) for settings s; small: words that captions have twice."""
    special = dict(pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>")
    if s.text == "small":
        words = Tokenizer(models.WordLevel(unk_token="<UNK>"))
        words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        reserved = [*special.values(), "<UNK>"]
        trainer = trainers.WordLevelTrainer(min_frequency=2, special_tokens=reserved)
        words.train_from_iterator((caption for ten in captions for caption in ten), trainer)
        options = dict(tokenizer_object=words, unk_token="<UNK>")
        return [hf.PreTrainedTokenizerFast(**options, **special)] * 2
    tokenizers = [pretrained(hf.AutoTokenizer, name) for name in (s.bert, s.gpt2)]
    tokenizers[1].add_special_tokens(special)
    return tokenizers


def tokenise(tokenizer, captions, length):
    """Captions, N lists of k, as tokens (N, k, length), padded on the right."""
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""  # BERT's adds its own
    flat = [f"{begin}{caption}{end}" for several in captions for caption in several]
    options = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokenizer(flat, **options)["input_ids"].view(len(captions), -1, length)


# ---- The two modalities --------------------------------------------------------------------------

def batch(data, i=slice(None)):
    """Examples i as the networks see them; where there are ten captions, one of them is drawn."""
    image, caption = data["image"][i] / 127.5 - 1, data["caption"][i].long()
    if caption.ndim == 4:  # (B, 10, 2, T)
        rows = torch.arange(len(caption), device=caption.device)
        caption = caption[rows, torch.randint(caption.shape[1], rows.shape, device=rows.device)]
    return {"image": image, "caption": caption}  # caption (B, 2, T): BERT's tokens, then GPT-2's


def text_networks(s, tokenizers):
    """The caption's encoder and decoder for settings s and (BERT's, GPT-2's) tokenizers."""
    words = tokenizers[1]
    special = {f"{k}_token_id": getattr(words, f"{k}_token_id") for k in ("pad", "bos", "eos")}
    if s.text == "small":
        size = dict(vocab_size=len(words), hidden_size=128, num_hidden_layers=2, **special)
        size |= dict(num_attention_heads=4, initializer_range=128**-0.5)
        still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        bert = hf.BertModel(hf.BertConfig(
            **size, intermediate_size=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(**size, **still))
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
    if s.latent_dim % 2:
        raise InputError(f"--latent-dim {s.latent_dim}: give an even number")
    pairs = zip(image_networks(s), text_networks(s, tokenizers))
    networks = [{"image": image, "caption": caption} for image, caption in pairs]
    model = DiffMVAE(*networks, s.family, s.beta, {"caption": s.weight})
    return model, LatentPrior(UNet(1, 1, s.channels, (1, 2)), (1, s.latent_dim))


def load(out, device="cpu"):
    """(model, prior, GPT-2's tokenizer) that a finished run left in the folder out."""
    tokenizers = [pretrained(hf.AutoTokenizer, str(Path(out) / name)) for name in TOKENIZERS]
    settings = lambda **saved: Settings(**saved | {"optimus": ""})  # the weights are in the run
    parts = train_celeba.load(out, device, settings, partial(build, tokenizers=tokenizers))
    return *parts, tokenizers[1]


# ---- Measuring (Tables 1 and 2), drawing (Figures 3 and 4), and the run --------------------------

def spell(words, tokens):
    """GPT-2's tokens (N, T) as N captions."""
    return words.batch_decode(tokens, skip_special_tokens=True)


def others(n):
    """For each of n examples the place of another one; in CUB a neighbour would be of its kind."""
    return torch.arange(n).roll(n // 2)


def caption_nats(model, x):
    """{given: log p(caption|z) in nats, averaged over examples x, z ~ q(z|given)}."""
    def log_prob(x, given):
        return [model.decoders["caption"].log_prob(x["caption"], infer(model, x, given))]

    other = x | {"image": x["image"][others(len(x["image"]))]}
    sources = {"both": (x, ("image", "caption")), "the caption": (x, ("caption",)),
               "the image": (x, ("image",)), "another bird's image": (other, ("image",))}
    return {label: {"nats": in_batches(lambda x: log_prob(x, given), x, label, 32)[0].mean().item()}
            for label, (x, given) in sources.items()}


def generate(model, words, x, n, prior=None):
    """{label: (pictures, captions)}: x, its captions from its images, n images from captions and,
    with the prior, n of both from nothing."""
    def sample(name, z):
        decode = model.decoders[name].sample
        found = in_batches(lambda b: [decode(b["z"])], {"z": z}, f"decoding {name}s")[0]
        return spell(words, found) if name == "caption" else found

    given = lambda name: in_batches(lambda x: [infer(model, x, [name])], x, "encoding")[0]
    image, said = x["image"], spell(words, x["caption"][:, 1])
    pairs = {"real": (image, said),
             "caption from image": (image, sample("caption", given("image"))),
             "image from caption": (sample("image", given("caption")[:n]), said[:n])}
    if prior:
        count = {"z": torch.empty(n)}
        z = in_batches(lambda b: [prior.sample(len(b["z"]))], count, "sampling the prior")[0]
        for label, z in (("latent prior", z), ("N(0, I)", torch.randn_like(z))):
            pairs[f"unconditional, {label}"] = sample("image", z), sample("caption", z)
    return pairs


def coherence(pairs, factors):
    """{label: {measure: share}}: colours that captions name, read from the pictures; all that they
    say, compared with the factors of real pictures; captions that follow the grammar."""
    known = {"real": factors, "caption from image": factors,
             "real, shuffled": [factors[i] for i in others(len(factors))]}
    table = {}
    for label, (pictures, captions) in pairs.items():
        said = [parse(caption) for caption in captions]
        table[label] = {"colours": agreement(said, read_colours(pictures))}
        if label in known:
            table[label]["all factors"] = agreement(said, known[label])
        grammatical = [re.fullmatch(GRAMMAR, caption) is not None for caption in captions]
        table[label]["grammatical"] = np.mean(grammatical).item()
    return table


def agreement(said, shown):
    """Of all that is said and can be seen, two lists of {factor: value}, the share that agrees."""
    agree = [a[k] == b[k] for a, b in zip(said, shown) for k in a.keys() & b.keys()]
    return sum(agree) / max(1, len(agree))


def table2(name, pairs, device):
    """{label: {measure: value}}: CLIP score, 100 cos (Hessel et al. 2021), and the Fréchet distance
    to real pictures among CLIP's features of pictures."""
    clip, words = pretrained(hf.CLIPModel, name).to(device), pretrained(hf.AutoTokenizer, name)
    side = clip.config.vision_config.image_size
    constants = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=device)
    mean, std = constants[..., None, None]  # (3, 1, 1) each

    def features(x):
        pixels = F.interpolate(x.pop("image"), (side, side), mode="bicubic", antialias=True)
        image = clip.get_image_features(((pixels + 1) / 2 - mean) / std).pooler_output
        return image, clip.get_text_features(**x).pooler_output

    found = {}
    for label, (pictures, captions) in pairs.items():
        tokens = words(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        found[label] = in_batches(features, {"image": pictures, **tokens}, "CLIP")
    real = found["real"][0]
    return {label: {"CLIP score": 100 * F.cosine_similarity(image, text).mean().item(),
                    "Fréchet, CLIP": frechet_distance(image, real)}
            for label, (image, text) in found.items()}


@torch.no_grad()
def draw(path, model, x, prior=None, words=None):
    """Figures 3 and 4: generate's rows; at the end, with the prior, four pictures a caption."""
    pairs = generate(model, words, x, len(x["image"]), prior)
    for again in range(2, 5 if prior else 2):
        pictures = model.decoders["image"].sample(infer(model, x, ["caption"]))
        pairs[f"image from caption ({again})"] = pictures, pairs["real"][1]
    rows, captions = ({label: pair[k] for label, pair in pairs.items()} for k in (0, 1))
    save_grid(path, rows, captions, side=128)


def run(s):
    """Data, both stages of training, the tables on the screen, results.json, samples.png."""
    birds = read_birds(Path(s.data), s.size) if s.data else draw_birds(s.size)
    tokenizers, data = text_tokenizers(s, birds["train"][1]), {}
    for split, (pictures, captions, _) in birds.items():
        tokens = [tokenise(tokenizer, captions, s.tokens) for tokenizer in tokenizers]
        data[split] = {"image": pictures.to(s.device), "caption": torch.stack(tokens, 2).to(s.device)}
    pair, words = build(s, tokenizers), tokenizers[1]
    model, prior, seconds = train(s, data["train"], pair, batch, partial(draw, words=words))
    for name, tokenizer in zip(TOKENIZERS, tokenizers):
        tokenizer.save_pretrained(Path(s.out) / name)
    torch.manual_seed(s.seed)
    test = batch(data["test"] | {"caption": data["test"]["caption"][:, 0]})
    pairs, factors = generate(model, words, test, s.measured, prior), birds["test"][2]
    pictures, captions = pairs["real"]
    pairs["real, shuffled"] = pictures[others(len(pictures))], captions
    results = {"log p(caption|z), z given": caption_nats(model, test)}
    if factors:
        results["coherence"] = coherence(pairs, factors)
    if s.clip:
        results["CLIP"] = table2(s.clip, pairs, s.device)
    for title, table in results.items():
        print(f"\n{title}")
        for label, row in table.items():
            print(f"{label:<28}", "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    few = {name: value[:8] for name, value in test.items()}
    draw(Path(s.out) / "samples.png", model, few, prior, words)
    save_results(s, results | {"seconds": seconds})


if __name__ == "__main__":
    main(run, Settings, __doc__)
