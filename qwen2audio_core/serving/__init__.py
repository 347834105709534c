"""The model over HTTP, as OpenAI's interface: `qwen2audio serve`.

    HTTP --app: who may, how much--> endpoints --> requests: JSON and forms to what is wanted
      --> sources, fetch: clips to waveforms --> answers: prompts into the engine, pieces out of it

policy          what a server allows: limits, key, files, addresses
service         what all requests share: model, engine, threads, memory account, metrics
app             routes; admission, errors and disconnection
chat            /v1/chat/completions
transcriptions  /v1/audio/transcriptions and /v1/audio/translations
run             socket, model, uvicorn, the clean end
command         the command line

Only the event loop waits here. Decoding, tokenizing and JSON of any size happen in a bounded pool
of threads, the model runs in the engine's own thread, and downloads are sockets of the loop. A
stranger's URL never reaches audio.load: it gets bytes from here, or a path that was checked.
"""
