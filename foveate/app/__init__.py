"""A page to look at models, runs and pictures in a browser: ``foveate app``.

``page`` lays it out with gradio; everything else computes, and knows nothing of gradio.
"""
