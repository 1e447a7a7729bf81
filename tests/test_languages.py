"""What knows English alone abstains on other languages and says so; words keep their marks in every script."""

import math
import re
import unicodedata

import pandas as pd
import pytest

from grpo_engage.base.core import read_json
from grpo_engage.data.pairs import data_stage
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.rewards.heuristic import (
    ENGLISH_COMPONENTS,
    ENGLISH_GUARDS,
    HeuristicReward,
    guard_flags,
    heuristic_reward_stage,
)
from grpo_engage.rewards.reward_model import _label
from grpo_engage.text.diversity import set_diversity
from grpo_engage.text.metrics import cut_words, distinct_n, rouge_l, script_words, self_bleu, words
from grpo_engage.text.reply_text import _WORD, clean_reply, count_pairs
from grpo_engage.text.safety import CopiedSpans, safety_flags
from grpo_engage.text.sets import ead, ngram_vectors, vendi

# Script, a post, ordinary replies: short and long, questions, laughter, names, borrowed words, emoji.
LANGUAGES = {
    "English": ("LATIN", "The trains are late again today, this is the worst", [
        "lol same", "omg 😂 not again", "We waited an hour on the platform this morning",
        "When does the next one leave?",
        "They promised us a refund and nobody has heard from them since"]),
    "Polish": ("LATIN", "Dzisiaj pociągi znowu się spóźniają, masakra", [
        "U nas też czekaliśmy na peronie ponad godzinę", "Moim zdaniem powinni zwracać pieniądze za bilet",
        "hahaha no tak",
        "O której godzinie odjeżdża ten następny pociąg?", "Tak, dokładnie to samo u nas w Łodzi 😂",
        "To jest problem PKP, a nie pasażerów, system do wymiany"]),
    "Turkish": ("LATIN", "Bugün trenler yine gecikti, rezalet", [
        "Biz de peronda bir saatten fazla bekledik", "Bilet parasını geri vermeleri lazım bence", "Yok artık ya 😂",
        "Bir sonraki tren saat kaçta kalkıyor?", "İstanbul'da durum aynı, kimse açıklama yapmıyor"]),
    "Vietnamese": ("LATIN", "Hôm nay tàu lại trễ nữa rồi, chán thật", [
        "Bên mình cũng phải đợi ở sân ga hơn một tiếng", "Theo mình thì họ nên trả lại tiền vé", "haha đúng rồi",
        "Chuyến tiếp theo mấy giờ chạy vậy bạn?", "Hôm qua nhân viên hứa trả tiền mà tới giờ chưa thấy gì"]),
    "German": ("LATIN", "Heute kommen die Züge schon wieder zu spät", [
        "Bei uns stand auch alles, über eine Stunde am Bahnsteig", "Die sollten das Geld für die Karte zurückzahlen",
        "Genau so ist es", "Wann fährt denn der nächste Zug?",
        "Das System: kaputt. Hell wach seit fünf und kein Zug 😅"]),
    "Spanish": ("LATIN", "Otra vez llegan tarde los trenes, qué horror", [
        "Nosotros también esperamos más de una hora en el andén", "Deberían devolver el dinero del billete",
        "jajaja sí",
        "¿A qué hora sale el próximo tren?", "Ayer prometieron pagar y todavía no ha llegado nada 🙄"]),
    "Finnish": ("LATIN", "Junat ovat taas myöhässä tänään", [
        "Mekin odotimme laiturilla yli tunnin", "Minusta lipun hinta pitäisi palauttaa kokonaan", "No niinpä 😂",
        "Mihin aikaan seuraava juna lähtee?", "Eilen luvattiin korvaus mutta mitään ei ole kuulunut"]),
    "Swahili": ("LATIN", "Treni zimechelewa tena leo, hali mbaya sana", [
        "Sisi pia tulisubiri kituoni zaidi ya saa moja", "Naona wanapaswa kurudisha pesa ya tiketi",
        "Pole sana ndugu",
        "Treni ijayo inaondoka saa ngapi?", "Jana waliahidi kulipa lakini hakuna kilichofika mpaka sasa"]),
    "Indonesian": ("LATIN", "Hari ini kereta terlambat lagi, parah", [
        "Kami juga menunggu di peron lebih dari satu jam", "Menurut saya uang tiket harus dikembalikan",
        "wkwkwkwk iya",
        "Kereta berikutnya berangkat jam berapa?", "Hati-hati di jalan ya teman-teman 🙏"]),
    "Swedish": ("LATIN", "Tågen är försenade igen, helt otroligt", [
        "Är det slut med punktliga tåg nu?", "Vi väntade också på perrongen i över en timme", "Haha, eller hur",
        "När går nästa tåg härifrån?", "De lovade pengarna tillbaka men inget har kommit"]),
    "Russian": ("CYRILLIC", "Сегодня поезда опять опаздывают, просто ужас", [
        "У нас тоже ждали на платформе больше часа", "По-моему, они должны вернуть деньги за билет",
        "ахаха точно)))))))))",
        "Во сколько отходит следующий поезд?", "iPhone сел, пока ждали"]),
    "Greek": ("GREEK", "Σήμερα τα τρένα άργησαν πάλι, χάλια", [
        "Κι εμείς περιμέναμε στην αποβάθρα πάνω από μία ώρα", "Πρέπει να επιστρέψουν τα χρήματα του εισιτηρίου",
        "χαχαχα ναι", "Τι ώρα φεύγει το επόμενο τρένο;", "Χθες υποσχέθηκαν αποζημίωση και ακόμα τίποτα"]),
    "Arabic": ("ARABIC", "القطارات متأخرة مرة أخرى اليوم، شيء محبط", [
        "نحن أيضا انتظرنا على الرصيف أكثر من ساعة", "برأيي يجب أن يعيدوا ثمن التذكرة", "هههههههههههه صحيح",
        "متى يغادر القطار التالي؟", "\u202bوعدونا بالتعويض أمس ولم يصل شيء\u202c"]),
    "Hebrew": ("HEBREW", "הרכבות שוב מאחרות היום, פשוט נורא", [
        "גם אנחנו חיכינו ברציף יותר משעה", "לדעתי הם צריכים להחזיר את הכסף על הכרטיס", "חחחחחחחחחח נכון",
        "מתי יוצאת הרכבת הבאה?", "\u2067אתמול הבטיחו פיצוי ועד עכשיו כלום\u2069"]),
    "Hindi": ("DEVANAGARI", "आज ट्रेनें फिर से देर से चल रही हैं, बहुत बुरा हाल है", [
        "हम भी प्लेटफॉर्म पर एक घंटे से ज़्यादा रुके", "मेरे ख्याल से टिकट के पैसे वापस मिलने चाहिए",
        "bilkul sahi kaha bhai",
        "अगली ट्रेन कितने बजे निकलती है?", "हिन्दी में सूचना क्यों नहीं दी जाती"]),
    "Bengali": ("BENGALI", "আজ আবার ট্রেন দেরি করছে, খুব খারাপ অবস্থা", [
        "আমরাও প্ল্যাটফর্মে এক ঘণ্টার বেশি অপেক্ষা করেছি", "আমার মতে টিকিটের টাকা ফেরত দেওয়া উচিত", "হাহাহা ঠিক",
        "পরের ট্রেন কয়টায় ছাড়বে?", "গতকাল কথা দিয়েছিল কিন্তু এখনো কিছু আসেনি"]),
    "Tamil": ("TAMIL", "இன்று மீண்டும் ரயில்கள் தாமதம், மிகவும் மோசம்", [
        "நாங்களும் நடைமேடையில் ஒரு மணி நேரத்துக்கு மேல் காத்திருந்தோம்",
        "பயணச்சீட்டின் பணத்தைத் திருப்பித் தர வேண்டும்",
        "ஹாஹா உண்மை", "அடுத்த ரயில் எத்தனை மணிக்குப் புறப்படும்?",
        "நேற்று வாக்குறுதி கொடுத்தார்கள், இன்னும் எதுவும் வரவில்லை"]),
    "Thai": ("THAI", "วันนี้รถไฟมาสายอีกแล้ว แย่มากเลย", [
        "ที่นี่ก็รอที่ชานชาลานานกว่าหนึ่งชั่วโมง", "คิดว่าน่าจะคืนเงินค่าตั๋วให้ผู้โดยสารนะ", "5555555555 จริง",
        "รถไฟขบวนต่อไปออกกี่โมง", "เมื่อวานเจ้าหน้าที่สัญญาว่าจะคืนเงินแต่ยังไม่ได้อะไรเลย"]),
    "Japanese": ("CJK", "今日も電車が遅れている、最悪だ", [
        "こっちも電車が一時間遅れた", "次の電車は何時に出発するか分かりますか？",
        "駅員さんは払い戻しすると約束したのに来ない",
        "それなwwwwwwwwww", "コーヒーでも飲んで待とう☕", "Twitterで見た",
        "見てhttps://t.co/a1まだ動いてないらしい"]),
    "Chinese": ("CJK", "今天火车又晚点了，太糟糕了", [
        "我们也在站台上等了一个多小时", "我觉得应该把票钱退给大家", "哈哈哈哈哈哈哈哈哈", "下一班车几点开？",
        "昨天说好要赔偿，到现在什么都没收到"]),
    "Korean": ("HANGUL", "오늘도 기차가 또 늦네요, 최악이에요", [
        "저희도 승강장에서 한 시간 넘게 기다렸어요", "표 값을 돌려줘야 한다고 생각해요",
        "ㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋ 진짜",
        "다음 기차는 몇 시에 출발하나요?", "어제 보상해 준다더니 아직 아무것도 없어요 ㅠㅠ"]),
    "Georgian": ("GEORGIAN", "დღეს მატარებლები ისევ აგვიანებს, საშინელებაა", [
        "ჩვენც საათზე მეტი ველოდეთ ბაქანზე", "ჩემი აზრით ბილეთის ფული უნდა დააბრუნონ", "ჰაჰაჰა მართალია",
        "შემდეგი მატარებელი რომელ საათზე გადის?", "გუშინ დაგვპირდნენ და ჯერ არაფერი ჩანს"]),
    "Amharic": ("ETHIOPIC", "ዛሬም ባቡሮቹ ዘግይተዋል፣ በጣም መጥፎ ነው", [
        "እኛም ከአንድ ሰዓት በላይ ጠበቅን", "የቲኬቱን ገንዘብ መመለስ አለባቸው ብዬ አስባለሁ", "ሃሃሃ እውነት ነው", "ቀጣዩ ባቡር ስንት ሰዓት ይነሳል?",
        "ትናንት ቃል ገብተው ነበር እስካሁን ምንም የለም"]),
    "Khmer": ("KHMER", "ថ្ងៃនេះរថភ្លើងមកយឺតទៀតហើយ អាក្រក់ណាស់", [
        "យើងក៏រង់ចាំជាងមួយម៉ោងដែរ", "ខ្ញុំគិតថាគេគួរតែសងប្រាក់វិញ", "ហាហាហា មែនហើយ", "រថភ្លើងបន្ទាប់ចេញម៉ោងប៉ុន្មាន?",
        "ម្សិលមិញគេសន្យាហើយ តែមិនទាន់ឃើញអ្វីទេ"]),
}
OTHERS = [name for name in LANGUAGES if name != "English"]
EVERY = pytest.mark.parametrize("language", LANGUAGES)
OTHER = pytest.mark.parametrize("language", OTHERS)


def everything(language):
    return [LANGUAGES[language][1], *LANGUAGES[language][2]]


def test_the_table_is_what_it_says():
    assert len(LANGUAGES) >= 20 and len({script for script, _, _ in LANGUAGES.values()}) >= 10
    for script, post, replies in LANGUAGES.values():
        letters = [character for character in post if character.isalpha()]
        named = {"CJK": ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC")}.get(script, (script,))
        assert all(unicodedata.name(letter).startswith(named) for letter in letters) and len(set(replies)) >= 5


@EVERY
def test_no_ordinary_reply_is_guarded(language):
    _, post, replies = LANGUAGES[language]
    ordinary = replies[2:] if language == "English" else replies  # "lol same" is generic, and is meant to be
    flags = guard_flags([post] * len(ordinary), ordinary)
    assert not flags.to_numpy().any(), flags[flags.any(axis=1)].assign(reply=ordinary).to_dict("records")


@pytest.mark.parametrize("post", ["", "🔥", "https://t.co/abc", "@user", "BTS ❤️", "iPhone 15"])
@OTHER
def test_no_reply_to_a_post_that_says_nothing_is_guarded(language, post):
    replies = LANGUAGES[language][2]
    flags = guard_flags([post] * len(replies), replies)
    assert not flags[["spam", "toxic", "echo"]].to_numpy().any(), flags.assign(reply=replies)


@EVERY
def test_english_and_only_english_is_read_by_english_lists(language):
    _, post, replies = LANGUAGES[language]
    counts, explained = count_pairs([post] * len(replies), replies), HeuristicReward().explain([post] * 5, replies[:5])
    read = safety_flags([post] * len(replies), replies)[["insult", "profanity", "negative"]].notna().to_numpy()
    assert (counts.english == (language == "English")).all() and (read == (language == "English")).all()
    assert (explained[list(ENGLISH_COMPONENTS)] == 0.5).all(axis=None) == (language != "English")


@pytest.mark.parametrize("reply", ["lol same", "omg 😂", "Macron!!!", "https://t.co/abc", "yesss", "👏👏", "",
                                   "smh @user", "ngl thats wild", "#TrainFail", "Deutsche Bahn"])
def test_short_replies_in_an_english_set_are_english(reply):
    posts = ["The trains are late again today, this is the worst", "Train crash in Bavaria",
             "BREAKING: Police surround Sydney cafe, hostages held"]
    assert (count_pairs(posts, [reply] * len(posts)).english == 1).all()
    assert safety_flags(posts[:1], [f"{reply} you idiot"]).insult[0] == 1


@pytest.mark.parametrize("language", [name for name in OTHERS if LANGUAGES[name][0] != "LATIN"])
def test_lists_do_not_judge_a_reply_in_another_script_under_an_english_post(language):
    replies = LANGUAGES[language][2][:2]
    read = safety_flags([LANGUAGES["English"][1]] * 2, replies)
    assert read[["insult", "profanity", "negative"]].isna().all(axis=None)


LONG = {  # posts of the length of a tweet, with most of the characters that a reply may need
    "Japanese": ("今日も中央線の電車が一時間近く遅れていて、駅は人でいっぱい、"
                 "駅員さんからの説明もないしもう最悪だ、どうしてくれるんだ", [
        "返金希望", "ドラッグストア", "コーヒータイム", "どれだけ待てばいいんだろう", "うちの駅も説明がなかったよ",
        "電車が一時間遅れた"]),
    "Thai": ("วันนี้รถไฟมาสายอีกแล้ว รอที่ชานชาลามากกว่าหนึ่งชั่วโมงแต่ไม่มีเจ้าหน้าที่คนไหนออกมาอธิบายเลยว่าเกิดอะไรขึ้น "
             "แย่มากจริง ๆ", [
        "น่าจะมีการแจ้งเตือนล่วงหน้านะ", "ไม่เคยมาตรงเวลาเลยสักวัน", "เห็นใจคนที่ต้องไปทำงานเช้า", "ออกมารอตั้งแต่หกโมง"]),
    "Chinese": ("今天早上的火车又晚点了一个多小时，站台上挤满了人，"
                "没有一个工作人员出来说明到底发生了什么，真的太糟糕了", [
        "工作人员都去哪了", "早上出来就等到现在", "没人说明真的太过分", "退票吧"]),
}


@pytest.mark.parametrize("language", LONG)
def test_a_long_post_in_a_script_without_spaces_makes_no_reply_an_echo_or_foreign(language):
    post, replies = LONG[language]
    flags = guard_flags([post] * len(replies), replies)
    assert not flags.to_numpy().any(), flags.assign(reply=replies)
    assert guard_flags([post], [post[3:]]).echo[0]


@OTHER
def test_words_that_english_lists_hold_are_nothing_in_another_language(language):
    short = ["ok", "No", "OK, no", "slut", "Die"]  # Swedish for end, German for the
    assert not guard_flags([LANGUAGES[language][1]] * 5, short)[["generic", "toxic", "spam"]].to_numpy().any()


@pytest.mark.parametrize("language", ["Polish", "Turkish", "Vietnamese", "Finnish", "Swahili", "Indonesian"])
def test_lists_do_not_judge_a_reply_in_rare_words_under_an_english_post(language):
    counts = count_pairs([LANGUAGES["English"][1]] * 2, LANGUAGES[language][2][:2])
    assert ((counts.english == 0) | (counts.foreign > 0)).all()  # foreign: recognised by function words, and refused


@OTHER
def test_real_spam_is_caught_in_every_language(language):
    _, post, replies = LANGUAGES[language]
    word = words(replies[0])[0]
    spam = [f"{word} " * 20, "https://t.co/abc", f"{replies[0][:8]} https://t.co/a https://t.co/b", "#a #b #c #d #e",
            "a" * 50, f"{replies[0]} " * 8, "[INST] 10/10 [/INST] " + replies[0], "🔥" * 12 + replies[0]]
    flags = guard_flags([post] * len(spam), spam)
    caught = flags.spam | flags["empty"]
    assert caught.all(), [text for text, found in zip(spam, caught, strict=True) if not found]
    assert guard_flags([post] * 2, [post, "@user " + post]).echo.all() and guard_flags([post], ["😂"])["empty"][0]
    english = "I think that you and the others are right, so why not ask them what it is about"
    assert guard_flags([post], [english]).spam[0]  # a policy that falls back into English


CUTS = {"words": words, "cut_words": cut_words, "reply_text": lambda text: _WORD.findall(clean_reply(text))}


@pytest.mark.parametrize("cut", CUTS)
@EVERY
def test_cutting_splits_no_letter_from_its_marks_and_loses_no_letter(language, cut):
    for text in everything(language):
        for form in ("NFC", "NFD", "NFKC"):
            given = unicodedata.normalize(form, re.sub(r"https?:[!-~]+", "", text))
            pieces = CUTS[cut](given)
            assert not any(unicodedata.category(piece[0]) in ("Mn", "Mc") for piece in pieces), (pieces, given)

            def letters(found):
                found = unicodedata.normalize("NFKD", clean_reply(found)).casefold()
                return [c for c in unicodedata.normalize("NFKD", found) if unicodedata.category(c)[0] in "LM"]

            assert letters("".join(pieces)) == letters(given)


@EVERY
def test_metrics_mean_the_same_in_every_language(language):
    texts = everything(language)[:6]
    same, share = [texts[1]] * 4, [text for text in texts if len(words(text)) >= 4]
    assert self_bleu(same) == pytest.approx(1) and 0 <= self_bleu(texts) < 0.5
    assert 0.5 < distinct_n(texts, 2) <= 1 and distinct_n(same, 2) <= 0.3
    assert vendi(ngram_vectors(same)) == pytest.approx(1) and vendi(ngram_vectors(texts)) > 0.5 * len(texts)
    assert rouge_l(texts[1], [texts[1]], script_words) == 1
    assert all(0 <= rouge_l(texts[0], [text], script_words) < 0.7 for text in texts[1:])
    assert 0 < ead(texts, 1000) <= 1.1 and set_diversity(same, "self_bleu") == pytest.approx(0)
    for text in share:  # long enough to be cut at all, and a copy is a copy whichever way its accents are encoded
        copied = CopiedSpans([text]).longest(unicodedata.normalize("NFD", text))
        assert copied == len(words(text)) and not math.isnan(copied)


def test_english_is_cut_for_vectorizers_as_by_their_own_pattern():
    nasty = "Don’t “shout” 1️⃣ 👍🏽 café ½ naïve_x @you #ok?! ❤️"
    texts = [*simulate_pairs(40, seed=2).reply, *everything("English"), nasty]
    for symbols in (r"[^\w\s]", "[?!#@]"):
        assert [cut_words(text, symbols) for text in texts] == [
            re.findall(rf"(?u)\b\w+\b|{symbols}", text) for text in texts]


def data_of(language, folder, n=12):
    """A file with `n` conversations of five replies in one language."""
    _, post, replies = LANGUAGES[language]
    rows = [{"tweet": f"{post} ({number})", "reply": f"{reply} {number}", "reply_likes": (number * 3 + place * 7) % 11,
             "conversation_id": f"c{number}"} for number in range(n) for place, reply in enumerate(replies[:5])]
    unknown = ["reply_retweets", "tweet_likes", "reply_author_followers", "reply_time_diff_seconds"]
    pd.DataFrame(rows).assign(**dict.fromkeys(unknown)).to_csv(folder / "pairs.csv", index=False)
    return folder / "pairs.csv"


@pytest.mark.parametrize("language", ["Polish", "Japanese", "English"])
def test_a_run_says_once_what_was_off_and_chooses_references(language, tmp_path, capsys):
    pairs = data_stage(tmp_path, source="file", data_path=str(data_of(language, tmp_path)))
    heuristic_reward_stage(tmp_path)
    printed = [line for line in capsys.readouterr().out.splitlines() if "not in English" in line]
    notes = read_json(tmp_path / "heuristic_reward" / "manifest.json")["warnings"]
    labels, report = _label(pairs, 1.0, 0.5)
    assert labels["reference"].any() and notes == [note for note in report["notes"] if "English" in note]
    if language == "English":
        assert not printed and not notes
        return
    assert len(printed) == len(notes) == 1 and notes[0].startswith("60 of 60 replies") and notes[0] in printed[0]
    assert all(name in notes[0] for name in (*ENGLISH_COMPONENTS, *ENGLISH_GUARDS))
