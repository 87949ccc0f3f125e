"""
Save and publish
================

A model is saved with its keywords, the digests of all files, a card, and the pixel sizes that it has seen.
"""

# %%
# Into a folder
# -------------

from pathlib import Path

import timm
import torch

from rat_timm import hub

model = timm.create_model("test_rat", pretrained=True).eval()
names = [f"digit {number}" for number in range(10)]
hub.save(
    model, "saved/digits", label_names=names, spacing_range=(0.5, 2.0), description="Handwritten digits, 32 units wide."
)
for file in sorted(Path("saved/digits").iterdir()):
    print(f"{file.name}: {file.stat().st_size} bytes")

# %%
# The card is what people see on the Hub. It is written once: change it as you like, it stays when you save again.

print(Path("saved/digits/README.md").read_text())

# %%
# And back
# --------
# timm makes the same network again, to the last bit. Pixels of another size than those that it has seen are a warning.

import warnings

again = timm.create_model("local-dir:saved/digits", pretrained=True).eval()
image = torch.rand(1, 3, 32, 32)
with torch.inference_mode():
    print("the same:", torch.equal(model(image, spacing=1.0), again(image, spacing=1.0)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again(image, spacing=4.0)
print(caught[0].message)

# %%
# A damaged file is an error that says what to do. Only safetensors are opened, never pickles.

weights = Path("saved/digits/model.safetensors")
damaged = bytearray(weights.read_bytes())
damaged[-1] ^= 1
weights.write_bytes(damaged)
try:
    timm.create_model("local-dir:saved/digits", pretrained=True)
except ValueError as error:
    print(str(error).replace(f"{Path.cwd()}/", ""))

# %%
# To the Hub
# ----------
# ``hf auth login``, and then the line below: it was not run here, where there is no account::
#
#     hub.push(model, "me/digits", label_names=names, spacing_range=(0.5, 2.0), private=True)
#     model = timm.create_model("hf-hub:me/digits", pretrained=True)
#
# Segmenters have ``segmenter.save(folder)`` and ``Segmenter.load(folder)``, which the training program and ``predict``
# use too. Weights that others published as pickles come in by ``python -m rat_timm convert``.
#
# Next: :doc:`plot_speed`. Reference: :api:`rat_timm.timm_api.hub`.
