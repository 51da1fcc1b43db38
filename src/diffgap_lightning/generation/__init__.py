"""Runs of a generator with and without a refiner, and the page on which a person hears the difference.

items.py         what sound is made for: texts and videos
run.py           the loop: conditions, waveforms, scores
folder.py        what is finished, on disk
spectrogram.py   pictures
page.py          the HTML page
loading.py       generators by name or folder
render.py        a Lightning callback that renders a few prompts in training
demo.py          the same in a browser, live
"""
