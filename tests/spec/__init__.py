"""METHOD.md as plain NumPy: the specification that the C engine is compared with. Float64 from float32 inputs (§9).

Slow and obvious, no dependency but NumPy; each function names its section. One module each for the scores of one head
(`scores`), the choice of slots (`selection`), sentences and steering (`sentences`), the decoder and its cache
(`decoder`), and the schedule of a row (`rows`). All of it is imported from here.

    decoder = Decoder(config, weights)                    # Hugging Face names, float32 arrays
    decoder.logits(tokens)                                # [n, vocab], full cache
    generate(decoder, prompt, 100, Method("rkv", budget=64))[1].trace
"""

from spec.decoder import *  # noqa: F403
from spec.rows import *  # noqa: F403
from spec.scores import *  # noqa: F403
from spec.selection import *  # noqa: F403
from spec.sentences import *  # noqa: F403
