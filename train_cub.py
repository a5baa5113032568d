"""Diff-MVAE on Caltech Birds (§4.1): a bird's image and its caption, each from the other.

    python train_cub.py               draws birds and captions, 32 px: ten minutes on two CPU cores
    python train_cub.py --data cub    the released data, 64 px, BERT and GPT-2, the paper's settings

What differs from train_celeba.py: a new modality, the caption, is an encoder that returns
(mu, logvar) and a decoder with log_prob and sample. The same command run again goes on.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import model_info
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoProcessor, AutoTokenizer, BertConfig, BertModel, CLIPModel, DynamicCache, GPT2Config,
    GPT2LMHeadModel, PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import train_celeba
from diffmvae import (
    DiffMVAE, InputError, LatentPrior, UNet, frechet_distance, in_batches, in_bf16, main, option,
    save_checkpoint, save_grid, save_results,
)
from train_celeba import image_networks, infer, open_picture, train


@dataclass
class Settings(train_celeba.Settings):
    """As for faces where nothing is said; the paper's settings where data are real."""

    out: str = option("runs/birds", "folder for checkpoints, numbers and pictures", "runs/cub")
    size: int = option(32, "side of the pictures in pixels", 64)
    steps: int = option(3000, "training steps of Diff-MVAE", 94_000)  # 500 epochs of 5,994 birds
    batch_size: int = option(8, "examples in a step", 32)
    weight: float = option(None, "of log p(caption|z) (default: 1 for a bound, or 5)")
    latent_dim: int = option(64, "dimensions of z, a multiple of 4", 768)
    multipliers: int = option([1, 2], "of them at each halving", [1, 2, 2, 4], nargs="+")
    text_rate: float = option(1e-3, "learning rate of the caption's networks", 5e-5)
    text: str = option("small", "small: words, untrained; pretrained: from --bert and --gpt2",
                       "pretrained", choices=("small", "pretrained"))
    bert: str = option("bert-base-cased", "the text's encoder: name in the hub, or local folder")
    gpt2: str = option("gpt2", "the text's decoder: name in the hub, or local folder")
    optimus: str = option("", "Optimus checkpoint to load into them (§4.1)")
    tokens: int = option(32, "longest caption; what is beyond is cut", 64)
    measured: int = option(128, "pictures generated of each kind for the measures", 6000)
    clip: str = option("", "CLIP for Table 2's score: name in the hub, or local folder")

    surrogate = dict(beta=0.01, weight=5.0)

    def rate_of(self, part):
        return self.text_rate if isinstance(part, (TextEncoder, TextDecoder)) else super().rate_of(part)


# ---- Drawn birds, and captions in varied words from the same factors -----------------------------

BIRDS = {"train": 8_000, "test": 500}
COLOURS = {"black": (25, 25, 30), "white": (246, 246, 242), "grey": (140, 140, 146),
           "brown": (122, 76, 38), "red": (208, 38, 44), "yellow": (242, 208, 48),
           "blue": (48, 88, 205), "green": (58, 152, 70)}
NOUNS = {"body": ("body", "throat"), "wing": ("wings", "secondaries"), "belly": ("belly", "breast"),
         "crown": ("crown", "cap"), "bill": ("bill", "beak")}
SHAPES = {"short": [(70, -27)], "long": [(88, -27)], "curved": [(72, -31), (78, 4)]}  # of the bill
SIZES = {"small": 0.68, "large": 0.85}
OPENINGS = ["this bird has", "the bird has", "a bird that has", "this {} bird has",
            "a {} bird with", "this is a {} bird with"]
SPOTS = {"body": (28, -18), "wing": (-8, -3), "belly": (10, 14), "crown": (28, -38), "bill": (55, -28)}


def draw_factors(rng):
    """{part: colour} with the bill's shape and the size, from a numpy Generator."""
    colours = {part: str(rng.choice(list(COLOURS))) for part in NOUNS}
    return colours | {"shape": str(rng.choice(list(SHAPES))), "size": str(rng.choice(list(SIZES)))}


def place(points, scale):
    """Bird's coordinates to the canvas of 128: both sizes have the bill's base in one place."""
    return [(92 + scale * (x - 44), 46 + scale * (y + 28)) for x, y in points]


def draw_bird(f, rng, size):
    """Picture (size, size, 3) of a bird with factors f; background, tone and place are rng's."""
    canvas = Image.new("RGB", (128, 128), tuple(rng.integers(60, 226, 3).tolist()))
    pen, shift = ImageDraw.Draw(canvas), rng.integers(-2, 3, 2)
    tone = {part: tuple(int(c * rng.uniform(0.9, 1.03)) for c in COLOURS[f[part]]) for part in NOUNS}
    shapes = [
        ("line", [(-2, 30), (-2, 52)], (90, 70, 60)), ("line", [(10, 30), (10, 52)], (90, 70, 60)),
        ("polygon", [(-64, -12), (-30, -8), (-30, 16), (-60, 2)], tone["body"]),  # tail
        ("ellipse", [(-40, -18), (28, 34)], tone["body"]),
        ("ellipse", [(-22, 6), (26, 36)], tone["belly"]),
        ("polygon", [(42, -41), *SHAPES[f["shape"]], (42, -13)], tone["bill"]),
        ("ellipse", [(8, -52), (50, -10)], tone["body"]),  # head
        ("chord", [(8, -52), (50, -10)], tone["crown"]),
        ("ellipse", [(-34, -12), (8, 12)], tone["wing"]),
        ("ellipse", [(34, -34), (42, -26)], (255, 255, 255)), ("ellipse", [(36, -32), (41, -27)], (0, 0, 0)),
    ]
    for shape, points, colour in shapes:
        box = [tuple(point + shift) for point in np.array(place(points, SIZES[f["size"]]))]
        options = dict(start=185, end=355) if shape == "chord" else dict(width=3) if shape == "line" else {}
        getattr(pen, shape)(box, fill=colour, **options)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def write_caption(f, rng):
    """A caption that names two to four parts of a bird with factors f."""
    parts = [str(part) for part in rng.permutation(list(NOUNS))[: rng.integers(2, 5)]]
    noun = {part: str(rng.choice(NOUNS[part])) for part in parts}
    look = lambda part, joint: joint.join([f["shape"]] * (part == "bill") + [f[part]])
    phrases = ["a " * (part != "wing") + f"{look(part, ' ')} {noun[part]}" for part in parts]
    end = ""
    if rng.random() < 0.4:
        phrases.pop()
        verb = "are" if parts[-1] == "wing" else "is"
        end = f" , and its {noun[parts[-1]]} {verb} {look(parts[-1], ' and ')}"
    listed = " , ".join(phrases[:-1]) + " and " * (len(phrases) > 1) + phrases[-1]
    return f"{str(rng.choice(OPENINGS)).format(f['size'])} {listed}{end}"


COLOUR, SHAPE, SIZE = (f"(?:{'|'.join(words)})" for words in (COLOURS, SHAPES, SIZES))
NOUN = {part: f"(?:{'|'.join(words)})" for part, words in NOUNS.items()}
PLAIN = f"(?:{NOUN['body']}|{NOUN['belly']}|{NOUN['crown']})"
SAYS = {part: f"({COLOUR}) {noun}|{noun} (?:is|are) (?:{SHAPE} and )?({COLOUR})"
        for part, noun in NOUN.items()}
SAYS |= {"shape": f"({SHAPE}) (?:and )?{COLOUR}", "size": f"({SIZE})"}
PHRASE = (f"(?:a {COLOUR} {PLAIN}|{COLOUR} {NOUN['wing']}|a {SHAPE} {COLOUR} {NOUN['bill']})")
END = f"(?:{PLAIN} is {COLOUR}|{NOUN['wing']} are {COLOUR}|{NOUN['bill']} is {SHAPE} and {COLOUR})"
GRAMMAR = (f"(?:{'|'.join(OPENINGS).replace('{}', SIZE)}) "
           f"{PHRASE}(?:(?: , {PHRASE})* and {PHRASE})?(?: , and its {END})?")


def parse(caption):
    """What a caption says: {part: colour}, with the bill's shape and the size where it tells."""
    found = {factor: re.search(pattern, caption) for factor, pattern in SAYS.items()}
    return {factor: match[match.lastindex] for factor, match in found.items() if match}


def read_colours(pictures):
    """{part: colour} of each picture, (N, 3, H, W) in [−1, 1]: the nearest one at the part's spot."""
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1  # (8, 3)
    points = np.array(place(SPOTS.values(), SIZES["large"])) * pictures.shape[-1] / 128
    seen = [pictures[:, :, i, j].cpu() for j, i in points.astype(int)]  # (N, 3) each
    nearest = torch.cdist(torch.stack(seen, 1), palette).argmin(-1)  # (N, parts)
    return [dict(zip(SPOTS, map(list(COLOURS).__getitem__, row))) for row in nearest.tolist()]


def agreement(said, shown):
    """Of what is said, two lists of {factor: value}, the share that is shown."""
    pairs = [(a[k], b[k]) for a, b in zip(said, shown) for k in a.keys() & b.keys()]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))


def draw_birds(size):
    """{split: (pictures (N, 3, size, size) uint8, ten captions each, factors)}, always the same."""
    print("These birds are drawn; --data cub takes real ones (see README.md).")
    data = {}
    for k, (split, n) in enumerate(BIRDS.items()):
        rng, pictures, captions = np.random.default_rng(k), [], []
        factors = [draw_factors(rng) for _ in range(n)]
        for f in tqdm(factors, f"drawing birds to {split}", unit=" birds"):
            pictures.append(draw_bird(f, rng, size))
            captions.append([write_caption(f, rng) for _ in range(10)])
        data[split] = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), captions, factors
    return data


# ---- CUB as released -----------------------------------------------------------------------------

def read_captions(path, count=10):
    """The lines of a caption file, repeated or cut to this count."""
    if not path.exists():
        raise InputError(f"{path} is missing: unpack the captions beside CUB_200_2011")
    lines = [line.strip() for line in path.read_text("utf-8", "replace").splitlines()]
    if not any(lines):
        raise InputError(f"{path} has no caption: unpack it again")
    return ([line for line in lines if line] * count)[:count]


def read_birds(folder, size):
    """{split: (pictures (N, 3, size, size) uint8, ten captions each, None)}; pictures are cached."""
    root, cache = folder / "CUB_200_2011", folder / f"diffmvae-{size}.pt"
    texts = next((folder / name for name in ("text", "text_c10") if (folder / name).exists()), None)
    for path in (root / "images.txt", root / "train_test_split.txt", root / "images"):
        if not path.exists() or not texts:
            raise InputError(f"{path if texts else folder / 'text'} is missing: --data is a folder "
                             "with CUB_200_2011 and text as released")
    table = lambda name: dict(line.split() for line in (root / name).read_text().splitlines() if line)
    names, training = table("images.txt"), table("train_test_split.txt")
    captions = {k: read_captions((texts / name).with_suffix(".txt")) for k, name in names.items()}
    saved = torch.load(cache, weights_only=True) if cache.exists() else {}
    if saved.get("names") != names:
        read = lambda name: np.asarray(open_picture(root / "images" / name, "RGB").resize((size, size)))
        with ThreadPoolExecutor() as pool:
            decoded = tqdm(pool.map(read, names.values()), "decoding birds", len(names))
            pictures = torch.from_numpy(np.stack(list(decoded))).permute(0, 3, 1, 2)
        saved = {"names": names, "pictures": pictures}
        save_checkpoint(cache, saved)
    data = {}
    for split, flag in (("train", "1"), ("test", "0")):
        rows = [i for i, k in enumerate(names) if training[k] == flag]
        data[split] = saved["pictures"][rows], [captions[k] for k in names if training[k] == flag], None
    return data


# ---- Text VAE: BERT's way in, GPT-2's way out, as Optimus (Li et al. 2020) -----------------------

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
    """p(caption|z): GPT-2 sees z as memory, the key and value of one more position in every layer,
    and in the embedding of every token. Tokens are padded on the right, where a causal model that
    looks left never sees them."""

    def __init__(self, gpt2, latent_dim, longest, every_subset):
        super().__init__()
        c = gpt2.config
        self.gpt2, self.longest, self.every_subset = gpt2, longest, every_subset
        self.memory = nn.Linear(latent_dim, c.n_layer * c.n_embd, bias=False)
        self.embedding = nn.Linear(latent_dim, c.n_embd, bias=False)

    def remember(self, z):
        """The cache that holds z alone: one position, (B, heads, 1, n_embd/heads), a layer."""
        c = self.gpt2.config
        memory = self.memory(z).view(len(z), c.n_layer, c.n_head, 1, -1)
        return DynamicCache([(m, m) for m in memory.unbind(1)])

    def forward(self, tokens, z, cache=None):
        """Logits of the token after each: (B, T) -> (B, T, vocabulary); cache has what is before."""
        inputs = self.gpt2.transformer.wte(tokens) + self.embedding(z)[:, None]  # (B, T, n_embd)
        cache = self.remember(z) if cache is None else cache
        return self.gpt2(inputs_embeds=inputs, past_key_values=cache, use_cache=True).logits

    def log_prob(self, x, z):
        """log p(caption|z) in nats, x: (B, 2, T) tokens, of which [:, 1] are GPT-2's -> (B,)."""
        tokens, pad = x[:, 1], self.gpt2.config.pad_token_id
        logits = in_bf16(self, tokens[:, :-1], z).transpose(1, 2)  # (B, vocabulary, T − 1)
        loss = F.cross_entropy(logits, tokens[:, 1:], ignore_index=pad, reduction="none")
        return -loss.sum(1)

    @torch.no_grad()
    def sample(self, z, top_p=0.0, temperature=1.0):
        """Captions as GPT-2's tokens, (B, longest − 1): greedy, or drawn from the likeliest tokens that hold
        a mass of top_p (Holtzman et al. 2020)."""
        c, cache = self.gpt2.config, self.remember(z)
        token = torch.full((len(z), 1), c.bos_token_id, device=z.device)
        tokens, ended = [], torch.zeros_like(token, dtype=torch.bool)
        while len(tokens) < self.longest - 1 and not ended.all():
            p = (in_bf16(self, token, z, cache)[:, -1] / temperature).softmax(-1)
            p, order = p.sort(descending=True)  # (B, vocabulary)
            p = p * (p.cumsum(-1) - p <= top_p)  # the likeliest is always in
            token = order.gather(1, p.multinomial(1)).masked_fill(ended, c.pad_token_id)
            ended |= token == c.eos_token_id
            tokens.append(token)
        tokens = torch.cat(tokens, dim=1)
        return F.pad(tokens, (0, self.longest - 1 - tokens.shape[1]), value=c.pad_token_id)


def pretrained(kind, name):
    """kind.from_pretrained of a local folder or a name in the hub, or an InputError at once."""
    try:
        return kind.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        cure = "give a local folder with its files, or connect to the hub"
        if Path(name).exists():
            raise InputError(f"{name} does not hold {kind.__name__}'s files: {cure}") from None
    try:
        model_info(name, timeout=10)  # fails at once, where from_pretrained would try for minutes
        return kind.from_pretrained(name)
    except Exception as problem:  # the hub's errors have no common class
        raise InputError(f"{name} cannot be had from the hub ({problem}): {cure}") from problem


def word_tokenizer(captions):
    """A tokenizer of lower-case words, those that occur twice in captions, a list of lists."""
    words = Tokenizer(models.WordLevel(unk_token="<UNK>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = dict(pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>", unk_token="<UNK>")
    trainer = trainers.WordLevelTrainer(min_frequency=2, special_tokens=list(special.values()))
    words.train_from_iterator((caption for ten in captions for caption in ten), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def text_tokenizers(s, captions):
    """(BERT's tokenizer, GPT-2's) for settings s and the training captions."""
    if s.text == "small":
        return [word_tokenizer(captions)] * 2
    pair = [pretrained(AutoTokenizer, name) for name in (s.bert, s.gpt2)]
    for name, tokenizer in zip((s.bert, s.gpt2), pair):
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise InputError(f"{name} has no vocabulary: give a folder with its tokenizer's files")
    pair[1].add_special_tokens(dict(pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>"))
    return pair


def tokenise(tokenizer, captions, length):
    """Captions, N lists of k, as tokens (N, k, length), padded on the right."""
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""  # BERT's adds its own
    flat = [f"{begin}{caption}{end}" for several in captions for caption in several]
    options = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokenizer(flat, **options)["input_ids"].view(len(captions), -1, length)


def load_optimus(path, encoder, decoder):
    """Load an Optimus checkpoint into a TextEncoder of BERT and a TextDecoder of GPT-2."""
    try:
        state = torch.load(path, "cpu", weights_only=True)
    except (OSError, UnpicklingError) as problem:
        raise InputError(f"{path} cannot be loaded safely ({problem}): give a file that holds only "
                         "the state dict") from problem
    state = state.get("model_state_dict", state)
    ours = {"encoder.linear.": "linear.", "encoder.": "bert.", "decoder.transformer.linear.": "memory.",
            "decoder.transformer.linear_emb.": "embedding.", "decoder.": "gpt2."}
    renamed = {"encoder": {}, "decoder": {}}
    for name, value in state.items():
        if prefix := next((prefix for prefix in ours if name.startswith(prefix)), None):
            renamed[prefix[:7]][ours[prefix] + name.removeprefix(prefix)] = value
    for side, network in (("encoder", encoder), ("decoder", decoder)):
        try:
            missing = network.load_state_dict(renamed[side], strict=False).missing_keys
        except RuntimeError as problem:  # other sizes
            raise InputError(f"{path}: {problem}; does --latent-dim fit?") from problem
        if missing:
            raise InputError(f"{path} is no Optimus checkpoint: it lacks the {side}'s {missing[0]}")


# ---- The two modalities --------------------------------------------------------------------------

def batch(data, i=slice(None)):
    """Examples i as the networks see them; of ten captions, where there are ten, one is drawn."""
    image, caption = data["image"][i] / 127.5 - 1, data["caption"][i].long()
    if caption.ndim == 4:  # (B, 10, 2, T)
        drawn = torch.randint(caption.shape[1], (len(caption),), device=caption.device)
        caption = caption[torch.arange(len(caption), device=caption.device), drawn]
    return {"image": image, "caption": caption}  # caption (B, 2, T): BERT's tokens, then GPT-2's


def text_networks(s, tokenizers):
    """The caption's encoder and decoder for settings s and (BERT's, GPT-2's) tokenizer."""
    words = tokenizers[1]
    special = {f"{k}_token_id": getattr(words, f"{k}_token_id") for k in ("pad", "bos", "eos")}
    if s.text == "small":
        size = dict(vocab_size=len(words), num_attention_heads=4, num_hidden_layers=2, hidden_size=128)
        bert = BertModel(BertConfig(**size, intermediate_size=512, pad_token_id=words.pad_token_id))
        gpt2 = GPT2LMHeadModel(GPT2Config(**size, n_positions=s.tokens + 1, **special))
    else:
        bert, gpt2 = pretrained(BertModel, s.bert), pretrained(GPT2LMHeadModel, s.gpt2)
        gpt2.resize_token_embeddings(len(words))
        gpt2.config.update(special)
    encoder = TextEncoder(bert, s.latent_dim)
    decoder = TextDecoder(gpt2, s.latent_dim, s.tokens, every_subset=s.text == "small")
    if s.optimus:
        load_optimus(s.optimus, encoder, decoder)
    return encoder, decoder


def build(s, tokenizers):
    """The untrained model and latent prior for settings s (§4.1); the prior's UNet is 1-D."""
    if s.latent_dim % 4:
        raise InputError(f"--latent-dim {s.latent_dim}: give a multiple of 4, as 64 or 768")
    image, caption = image_networks(s), text_networks(s, tokenizers)
    pairs = [{"image": image[k], "caption": caption[k]} for k in (0, 1)]
    model = DiffMVAE(*pairs, s.family, s.beta, {"caption": s.weight})
    return model, LatentPrior(UNet(1, 1, s.channels, (1, 2)), (1, s.latent_dim))


def load(out, device="cpu"):
    """(model, prior, GPT-2's tokenizer) that a finished run left in the folder out."""
    pair = [AutoTokenizer.from_pretrained(Path(out) / name) for name in TOKENIZERS]
    parts = train_celeba.load(out, device, Settings, partial(build, tokenizers=pair))
    return *parts, pair[1]


# ---- Measuring (Tables 1 and 2), drawing (Figures 3 and 4), and the run --------------------------

TOKENIZERS = ("tokenizer-in", "tokenizer-out")


def spell(words, tokens):
    """GPT-2's tokens (N, T) as a list of captions."""
    return words.batch_decode(tokens, skip_special_tokens=True)


def generate(model, prior, words, test, captions, n):
    """{label: (pictures, captions)}: one side generated from the other, both from nothing; real."""
    sample = lambda name, z: in_batches(lambda b: [model.decoders[name].sample(b["z"])], {"z": z}, name)[0]
    given = lambda *names: in_batches(lambda x: [infer(model, batch(x), names)], test, "encoding")[0]
    real = batch(test)["image"]
    pairs = {
        "caption → image": (sample("image", given("caption")[:n]), captions[:n]),
        "image → caption": (real, spell(words, sample("caption", given("image")))),
    }
    noise = torch.randn(n, *prior.mean.shape, device=real.device)
    for label, z in (("latent prior", prior.sample(n)), ("N(0, I)", noise)):
        pairs[f"unconditional, {label}"] = sample("image", z), spell(words, sample("caption", z))
    return pairs | {"real pairs": (real, captions), "real, shuffled": (real.roll(1, 0), captions)}


def coherence(pairs, factors):
    """{label: {measure: share}}: the colours that a caption names are read from its picture, all
    that it says is compared with the factors of a real picture, and its grammar is tested."""
    known = {"image → caption": factors, "real pairs": factors,
             "real, shuffled": factors[-1:] + factors[:-1]}
    table = {}
    for label, (pictures, captions) in pairs.items():
        said = [parse(caption) for caption in captions]
        table[label] = {"colours": agreement(said, read_colours(pictures))}
        if label in known:
            table[label]["all factors"] = agreement(said, known[label])
        correct = [re.fullmatch(GRAMMAR, caption) is not None for caption in captions]
        table[label]["grammatical"] = sum(correct) / len(correct)
    return table


def caption_nats(model, test):
    """log p(caption|z) in nats, averaged over test, for z ~ q(z|what is given)."""
    def told(x, given):
        return [model.decoders["caption"].log_prob(x["caption"], infer(model, given, given))]

    other = lambda x: {"image": batch(x)["image"].roll(1, 0)}
    only = lambda *names: lambda x: {name: batch(x)[name] for name in names}
    sources = {"both": only("image", "caption"), "the caption": only("caption"),
               "the image": only("image"), "another bird's image": other}
    score = lambda f, label: in_batches(lambda x: told(batch(x), f(x)), test, label)[0].mean().item()
    return {label: score(source, label) for label, source in sources.items()}


def clip_score(image, text):
    """CLIP score of features (N, d): 100 cos, as in the paper's Table 2 (Hessel et al. 2021)."""
    return 100 * F.cosine_similarity(image, text)


@torch.no_grad()
def table2(name, pairs, device):
    """{label: CLIP score, and the Fréchet distance to real pictures in CLIP's space}, Tables 1, 2."""
    clip, words = pretrained(CLIPModel, name).to(device).eval(), pretrained(AutoTokenizer, name)
    side = clip.config.vision_config.image_size
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def look(x):
        pixels = F.interpolate(x["image"], (side, side), mode="bicubic", antialias=True)
        return [clip.get_image_features(((pixels + 1) / 2 - mean) / std).pooler_output]

    def features(pictures, captions, label):
        tokens = words(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        read = lambda x: [clip.get_text_features(**x).pooler_output]
        return in_batches(look, {"image": pictures}, label)[0], in_batches(read, tokens, label)[0]

    found = {label: features(*pair, label) for label, pair in pairs.items()}
    real = found["real pairs"][0]
    return {label: {"CLIP score": clip_score(*pair).mean().item(),
                    "Fréchet, CLIP": frechet_distance(pair[0], real)} for label, pair in found.items()}


@torch.no_grad()
def draw(path, model, x, prior=None, words=None):
    """Figures 3 and 4: real pairs, each side from the other, and with the prior from nothing."""
    look, tell = model.decoders["image"].sample, lambda z: spell(words, model.decoders["caption"].sample(z))
    n, said = len(x["image"]), spell(words, x["caption"][:, 1])
    rows, under = {"real": x["image"]}, {"real": said}
    rows["image → caption"], under["image → caption"] = x["image"], tell(infer(model, x, ["image"]))
    four = {"caption": x["caption"][: n // 2].repeat_interleave(4, dim=0)}
    strips = look(infer(model, four, four)).unflatten(0, (-1, 4)).permute(0, 2, 3, 1, 4).flatten(3)
    for k in range(0, n // 2, n // 4):
        label = f"caption → image ({1 + k})"
        rows[label], under[label] = strips[k:k + n // 4], said[k:k + n // 4]
    if prior:
        noise = torch.randn(n, *prior.mean.shape, device=x["image"].device)
        for label, z in (("latent prior", prior.sample(n)), ("N(0, I)", noise)):
            rows[f"unconditional, {label}"], under[f"unconditional, {label}"] = look(z), tell(z)
    save_grid(path, rows, under, side=128)


def run(s):
    """Data, both stages of training, the tables on the screen, results.json, samples.png."""
    drawn = read_birds(Path(s.data), s.size) if s.data else draw_birds(s.size)
    pair = text_tokenizers(s, drawn["train"][1])
    for name, tokenizer in zip(TOKENIZERS, pair):
        tokenizer.save_pretrained(Path(s.out) / name)
    data = {}
    for split, (pictures, captions, _) in drawn.items():
        tokens = [tokenise(tokenizer, captions, s.tokens) for tokenizer in pair]
        data[split] = {"image": pictures.to(s.device), "caption": torch.stack(tokens, 2).to(s.device)}
    words = pair[1]
    show = partial(draw, words=words)
    model, prior, seconds = train(s, data["train"], partial(build, tokenizers=pair), batch, show)
    torch.manual_seed(s.seed)
    test = data["test"] | {"caption": data["test"]["caption"][:, 0]}
    captions, factors = [several[0] for several in drawn["test"][1]], drawn["test"][2]
    results = {"log p(caption|z), nats": caption_nats(model, test)}
    for label, value in results["log p(caption|z), nats"].items():
        print(f"log p(caption|z), z from {label:<22} {value:8.2f} nats")
    pairs = generate(model, prior, words, test, captions, s.measured)
    if factors:
        results["coherence"] = coherence(pairs, factors)
    if s.clip:
        results["CLIP"] = table2(s.clip, pairs, s.device)
    for table in (results.get("coherence"), results.get("CLIP")):
        for label, row in (table or {}).items():
            print(f"{label:<28}", "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    draw(Path(s.out) / "samples.png", model, batch(test, slice(8)), prior, words)
    save_results(s, results | {"seconds": seconds})


if __name__ == "__main__":
    main(run, Settings, __doc__)
