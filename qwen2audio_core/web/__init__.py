"""The page to talk to the model in a browser: `qwen2audio demo`.

command   the command's options
server    the page on the network
page      where everything stands on the page (Gradio)
app       what its buttons do (Gradio)
views     a conversation as the page shows it (Gradio)
sessions  a conversation per page, its clips, and the limits that hold for all
worker    the one thread that runs the model, and the line before it
guard     what the server lets through, and what it forbids the browser
pictures  spectrograms and clips
inside    the last answer opened
words     every text of the page, in English and Chinese

Gradio is imported inside functions alone: without it everything else can be imported and tested.
"""
