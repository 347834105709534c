// What the page does by itself when it is opened.
() => {
  const all = document.querySelector('.gradio-container');
  const chat = document.querySelector('#q2a-chat');

  // Why there is no microphone: views writes all lines, style.css shows the one in question.
  const why = reason => { document.querySelector('#q2a-trouble').dataset.why = reason; };
  const devices = navigator.mediaDevices;
  if (!devices || !devices.getUserMedia) why('insecure');
  else {
    const ask = devices.getUserMedia.bind(devices);
    devices.getUserMedia = wanted => ask(wanted).then(
      sound => { why(''); return sound; },
      error => { why(error.name === 'NotAllowedError' ? 'refused' : 'missing'); throw error; });
  }

  // In which language it is.
  const heading = document.querySelector('.q2a-heading');
  const speak = () => {
    const title = heading.querySelector('h1[lang]');
    if (title) document.documentElement.lang = title.lang;
  };
  new MutationObserver(speak).observe(heading, {childList: true, subtree: true});
  speak();

  // The end of the conversation stays in sight, unless somebody reads further up; what is being
  // written is read out when it is complete.
  let follows = true, asked = 0;
  chat.addEventListener('scroll', event => {
    const box = event.target;
    follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  }, true);
  const follow = () => {
    const box = chat.querySelector('[role=log]');
    if (!box) return;
    const stop = document.querySelector('#q2a-stop');
    box.setAttribute('aria-busy', String(Boolean(stop && stop.offsetParent)));
    const count = chat.querySelectorAll('[data-testid=user]').length;
    if (count > asked) follows = true;
    asked = count;
    if (follows) box.scrollTop = box.scrollHeight;
  };
  new MutationObserver(follow).observe(
    all, {childList: true, subtree: true, characterData: true});

  // Whoever uses the keyboard goes on in the message box when a button disappears under it.
  let keyboard = false;
  addEventListener('keydown', () => { keyboard = true; }, true);
  addEventListener('pointerdown', () => { keyboard = false; }, true);
  addEventListener('focusout', () => setTimeout(() => {
    if (keyboard && document.hasFocus() && document.activeElement === document.body)
      document.querySelector('#q2a-text textarea').focus();
  }, 300), true);

  // A conversation is forgotten with its page.
  addEventListener('beforeunload', event => {
    const draft = document.querySelector('#q2a-text textarea');
    if (asked || (draft && draft.value)) event.preventDefault();
  });
}
