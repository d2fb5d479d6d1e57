"""Show models, runs and pictures on a page in a browser: ``foveate app``.

``page`` lays the page out with gradio. The other modules compute what it shows, without gradio.
"""
