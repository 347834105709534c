"""Every text of the page, in English and Chinese."""

from qwen2audio_core.tiny import WARNINGS

LANGUAGES = {"en": "English", "zh": "中文"}

_WORDS = {
    # The page
    "tagline": ("Talk to it, or let it listen.", "和它说话，或让它听声音。"),
    "conversation": ("Conversation", "对话"),
    "inside": ("Look inside", "查看内部"),
    "empty": (
        "### Record a question, or give it a sound\n"
        "Speak, or add clips and ask about them. Several clips and a text can go in one turn.",
        "### 录一个问题，或给它一段声音\n直接说话，或添加音频再提问。一轮中可以有多段音频和文字。",
    ),
    "tiny": (
        WARNINGS["tiny"],
        "这是本项目自带的小模型：只从合成语音学过几百个词和一些声音，其余的会答错。",
    ),
    "random": (
        WARNINGS["random"],
        "这是随机初始化的小模型：只用来展示流程，它说的话没有意义。",
    ),
    # The composer
    "record": ("Speak", "录音"),
    "upload": ("Add clips", "添加音频"),
    "voice": ("Answer as soon as a recording ends", "录音结束后立即回答"),
    "text": ("Message", "消息"),
    "text hint": ("Ask something", "输入问题"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "retry": ("Try again", "重新回答"),
    "edit": ("Edit last turn", "编辑上一轮"),
    "clear": ("Clear", "清空"),
    "remove": ("Remove", "移除"),
    # The settings
    "settings": ("Settings", "设置"),
    "system": ("System prompt", "系统提示词"),
    "system hint": (
        "Another one holds from the next answer on",
        "修改后从下一次回答起生效",
    ),
    "temperature": ("Temperature", "温度"),
    "temperature hint": ("0 always takes the likeliest word", "0 表示总取最可能的词"),
    "seed": ("Seed", "随机种子"),
    "seed hint": ("The same number gives the same answer", "相同的数字得到相同的回答"),
    "by chance": ("by chance", "随机"),
    "bad seed": ("The seed is a whole number, or left empty.", "随机种子应为整数，或留空。"),
    "tokens": ("Longest answer, in tokens", "回答的最大长度（token）"),
    # What happens
    "thinking": ("Listening", "正在听"),
    "in line": ("In line, {} before you", "排队中，前面还有 {} 个"),
    "stopped": ("stopped", "已停止"),
    "silent": ("it said nothing", "没有说话"),
    "cut": ("cut after {} tokens", "在 {} 个 token 处截断"),
    "took": ("{} tokens, {:.1f} s", "{} 个 token，{:.1f} 秒"),
    "facts": ("{:.1f} s · {} tokens", "{:.1f} 秒 · {} token"),
    "notice": ("Note: {}", "提示：{}"),
    "error": ("{}", "出错了：{}"),
    "recording": ("recording {}", "录音 {}"),
    # Mistakes
    "nothing asked": (
        "Nothing was asked yet: type a message, or add a clip.",
        "还没有内容：请输入消息或添加音频。",
    ),
    "still answering": (
        "The last answer is still being written: stop it or wait.",
        "上一个回答还未完成：请停止或等待。",
    ),
    "nothing to retry": ("There is no turn to try again.", "没有可以重新回答的内容。"),
    "nothing to edit": ("There is no turn to edit.", "没有可以编辑的内容。"),
    "too many clips": (
        "{1} was left out: one turn takes up to {0} clips, send these first.",
        "未添加 {1}：一轮最多 {0} 段音频，请先发送。",
    ),
    "too large": ("A clip may have up to {} MB.", "音频文件不能超过 {} MB。"),
    "full": (
        "This conversation is as long as the model can hear: clear it, or edit the last turn.",
        "对话已达到模型的最大长度：请清空，或编辑上一轮。",
    ),
    "no microphone insecure": (
        "No microphone here: browsers give it to https and to this machine alone. Add clips.",
        "无法使用麦克风：浏览器只允许 https 或本机页面使用。请添加音频。",
    ),
    "no microphone refused": (
        "The microphone was not allowed: allow it beside the address, then press Record again.",
        "未获得麦克风权限：请在地址栏旁允许，然后再录音。",
    ),
    "no microphone missing": (
        "No microphone was found: connect one, or add a clip.",
        "没有找到麦克风：请连接麦克风，或添加音频。",
    ),
    # Inside
    "inside hint": (
        "The words of the last answer, the surer the darker; point at one for other likely ones.",
        "最近一次回答的词语，颜色越深表示模型越确定。指向一个词可查看其他可能。",
    ),
    "look": ("Look closer", "深入查看"),
    "looking": ("Looking: {} … {:.0%}", "正在查看：{} … {:.0%}"),
    "kind template": ("template", "模板"),
    "kind system": ("system prompt", "系统提示词"),
    "kind text": ("text", "文字"),
    "kind audio": ("audio", "音频"),
    "kind answer": ("answer", "回答"),
    "no answer": (
        "There is no answer yet: ask something in the conversation first.",
        "还没有回答：请先在对话中提问。",
    ),
    # Examples
    "answer it": ("Answer a spoken question", "回答语音提问"),
    "transcribe it": ("Write down what is said", "写下所说的话"),
    "translate it": ("Translate Chinese speech", "翻译中文语音"),
    "what sound": ("Name a sound", "辨认声音"),
    "what language": ("Name a language", "辨认语言"),
    "compare them": ("Compare two clips", "比较两段音频"),
    "ask transcribe": ("What does the person say?", "这个人说了什么？"),
    "ask translate": ("Translate it into English.", "请把它翻译成英文。"),
    "ask sound": ("What is that sound?", "这是什么声音？"),
    "ask language": ("Which language is this?", "这是什么语言？"),
    "ask compare": ("Which of the two is speech?", "两段中哪一段是人说话？"),
}


def words(language: str) -> dict[str, str]:
    """All texts in "en" or "zh"."""
    column = list(LANGUAGES).index(language)
    return {name: texts[column] for name, texts in _WORDS.items()}


def preferred(accept_language: str) -> str:
    """The language a browser asks for first, of those there are. RFC 9110, section 12.5.4."""
    best, found = 0.0, "en"
    for part in accept_language.split(","):
        tag, _, weight = part.strip().partition(";q=")
        try:
            quality = float(weight) if weight else 1.0
        except ValueError:
            continue
        name = tag.split("-")[0].lower()
        if name in LANGUAGES and quality > best:
            best, found = quality, name
    return found
