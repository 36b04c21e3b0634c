"""Gates, which decide how strongly a patch acts on each prompt; one file per kind of gate, and `parse.py`.

`always`: the patch acts at full strength on every prompt. `text`: by the similarity of the prompt to the erased texts
(see text.py). `latent`: by the effect of the patch on partially denoised latents (see latent.py).
"""
