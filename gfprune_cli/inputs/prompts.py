"""What text-to-image networks are asked for: a built-in list, or the user's file."""

import hashlib
from pathlib import Path

from gfprune_cli.errors import UsageError

FILE_BYTES = 1 << 24
PROMPT_CHARACTERS = 4096
PROMPT_COUNT = 100_000

BUILT_IN = """\
a photograph of a red fox in deep snow
an old fisherman mending a net, oil painting
a bowl of ramen seen from above
city street at night in the rain, neon signs
a watercolour of a lighthouse on a cliff
two children flying a kite on a beach
a steam train crossing a stone viaduct
macro photograph of a dragonfly
a quiet library with tall wooden shelves
portrait of a woman with freckles, soft light
a mountain lake at sunrise, mist over the water
a blue ceramic teapot on a white table
an astronaut walking through a wheat field
pixel art of a castle under a full moon
a market stall full of oranges and lemons
black and white photograph of a jazz trumpeter
a cat asleep on a windowsill
an aerial view of terraced rice fields
a wooden chair in an empty room
a knight in shining armour, fantasy illustration
a vintage car parked by the sea
a slice of chocolate cake with raspberries
a flock of geese over a frozen river
isometric drawing of a small coffee shop
a hot air balloon above a desert canyon
an elderly couple dancing in a kitchen
a glass skyscraper reflecting clouds
a robot watering plants in a greenhouse
a pencil sketch of a sleeping dog
a waterfall in a tropical forest
a basketball player jumping, frozen in motion
a still life with pears and a silver jug
a snowy village with lit windows at dusk
a close-up of a green tree frog on a leaf
a poster for an imaginary film, bold shapes
a violin lying on sheet music
a surfer inside a large wave
an abandoned factory overgrown with ivy
a bouquet of wild flowers in a jar
a polar bear on drifting ice
a Japanese garden with a red bridge
a child's drawing of a house and a sun
a blacksmith at work, sparks flying
a plate of sushi on dark slate
a spiral staircase seen from below
a field of sunflowers under storm clouds
a submarine near a coral reef
a stained glass window with birds
a bicycle leaning on a yellow wall
a wolf howling on a ridge at night
a bedroom in mid-century style
a marble statue of a thinker
a busy harbour with sailing boats, impressionist
a hummingbird in front of a purple flower
a wizard reading by candlelight
a stack of pancakes with maple syrup
a long straight road through a desert
a paper origami crane on a wooden desk
a crowd watching fireworks over a bridge
an owl with orange eyes in the dark
a greenhouse full of cacti
a chess board in the middle of a game
northern lights above a cabin
a wall of colourful graffiti
""".splitlines()


def read_prompts(source: str | None) -> list[str]:
    """The prompts of a UTF-8 file, one per line, empty lines left out; without a file the built-in ones.

    Raises:
        UsageError: no readable text file, no prompt in it, or one that is endless.
    """
    if source is None:
        return BUILT_IN
    try:
        path = Path(source).expanduser()
        if path.exists() and not path.is_file():  # opening a pipe or a device would hang
            raise UsageError(f"--prompts {source}: not a regular file; give a text file, one prompt per line")
        if path.stat().st_size > FILE_BYTES:
            raise UsageError(f"--prompts {source}: larger than {FILE_BYTES} bytes; give one prompt per line")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {source}: not UTF-8 text; convert it") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise UsageError(f"--prompts {source}: {reason}; give a text file, one prompt per line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {source}: no prompt in it; give one per line")
    if len(prompts) > PROMPT_COUNT:
        raise UsageError(f"--prompts {source}: more than {PROMPT_COUNT} prompts; shorten it")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > PROMPT_CHARACTERS:
            raise UsageError(
                f"--prompts {source}: prompt {number} has more than {PROMPT_CHARACTERS} characters"
            )
    return prompts


def prompts_fingerprint(source: str | None) -> str | None:
    """SHA-256 of the prompts in the user's file; None for the built-in ones."""
    if source is None:
        return None
    return hashlib.sha256("\n".join(read_prompts(source)).encode()).hexdigest()
