"""What the model is asked: templates and topics for training, and prompts held out from it."""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """A kind of task, how far it is from the training data, and the user's message."""

    task: str
    group: str
    text: str


TOPICS = """cats; dogs; the moon; volcanoes; bicycles; coffee; tea; chess; the Roman Empire; dinosaurs; \
black holes; photosynthesis; the water cycle; climate change; solar energy; wind power; electric \
cars; airplanes; trains; submarines; bridges; skyscrapers; gardening; pasta; bread; chocolate; \
cheese; honey bees; ants; butterflies; whales; sharks; penguins; elephants; lions; owls; horses; \
wolves; the human heart; the brain; sleep; exercise; yoga; meditation; running; swimming; football; \
basketball; tennis; classical music; the piano; the guitar; jazz; painting; photography; sculpture; \
theatre; film making; video games; novels; poetry; libraries; primary schools; teachers; students; \
homework; universities; physics; chemistry; biology; algebra; geometry; statistics; computers; the \
internet; smartphones; robots; artificial intelligence; databases; web development; cybersecurity; \
social media; email; newspapers; television; radio; money; banks; saving money; taxes; small \
businesses; marketing; leadership; teamwork; time management; job interviews; stress; friendship; \
family; marriage; raising children; birthdays; public holidays; winter festivals; travel; Paris; \
Japan; New York; Africa; the Amazon rainforest; deserts; oceans; rivers; mountains; islands; caves; \
earthquakes; hurricanes; rain; snow; clouds; the sun; Mars; the stars; space travel; satellites; \
telescopes; clocks; maps; learning languages; English grammar; world history; ancient Egypt; the \
Middle Ages; the Industrial Revolution; the Second World War; democracy; laws; human rights; voting; \
the police; doctors; hospitals; vaccines; vitamins; healthy food; vegetables; fruit; drinking water; \
salt; sugar; plastic; recycling; pollution; forests; oak trees; wild flowers; roses; farms; cows; \
chickens; fishing; camping; hiking; boats; pirates; dragons; magic; ghosts; superheroes; a lost key; \
an old house; a brave girl; a lonely robot; a small village; a secret garden; a talking tree; a long \
journey; a king and a queen; kindness; honesty; courage; patience; happiness; dreams; memory; \
creativity; curiosity; failure; success; fashion; shoes; furniture; house plants; kitchens; cleaning; \
laundry; pets; zoos; museums; circuses; toys; puzzles; the stock market; inflation; supply and \
demand; insurance; startups; remote work; office meetings; customer service; public speaking; resumes; \
negotiation; project management; supply chains; construction; architecture; city planning; public \
transport; traffic; road safety; firefighters; nurses; dentists; pharmacies; allergies; the common \
cold; broken bones; first aid; mental health; anxiety; habits; motivation; self-confidence; \
procrastination; budgeting; credit cards; retirement; student loans; real estate; renting a flat; \
moving to a new city; roommates; neighbours; weddings; babies; teenagers; grandparents; siblings; \
adoption; volunteering; charity; refugees; migration; the United Nations; the European Union; \
presidents; revolutions; the Cold War; the Renaissance; the Vikings; the Silk Road; the Great Wall; \
ancient Greece; the Aztecs; the Ottoman Empire; samurai; castles; knights; coins; stamps; antiques; \
opera; ballet; hip hop; the violin section of an orchestra; drums; singing; cartoons; comics; science \
fiction; detective stories; fairy tales; myths; philosophy; ethics; religion; Buddhism; psychology; \
sociology; anthropology; linguistics; archaeology; geology; fossils; minerals; gold; diamonds; iron; \
oil; nuclear power; batteries in phones; electricity; magnets; lasers; sound; light; gravity; \
relativity; atoms; molecules; acids and bases; the periodic table; DNA; cells; bacteria; viruses; \
evolution; ecosystems; coral reefs; endangered species; migration of birds; insects; spiders; snakes; \
frogs; turtles; crocodiles; bears; foxes; rabbits; squirrels; mice; bats; eagles; parrots; dolphins; \
octopuses; jellyfish; seaweed; mosses; cacti; bamboo; potatoes; tomatoes; onions; apples; bananas; \
oranges; grapes; wine; beer; juice; milk; eggs; fish dishes; soup; salads; pizza; burgers; sushi; \
curry; spices; breakfast; picnics; restaurants; street food; baking cakes; ice cream; cookies; sorting \
algorithms; linked lists; binary trees; hash tables; recursion; regular expressions; version control; \
operating systems; compilers; computer networks; cloud computing; encryption; passwords; spam; web \
browsers; search engines; machine learning; neural networks; chatbots; self-driving cars; drones; 3D \
printing; virtual reality; blockchain; open source software; unit testing; software bugs; APIs; \
spreadsheets; data visualization; probability; prime numbers; fractions; calculus; matrices; triangles; \
the number pi; logic puzzles; card games; board games; the Olympic Games; baseball; ice hockey; \
cricket; skiing; surfing; climbing; boxing; martial arts; dance; knitting; woodworking; pottery; \
origami; calligraphy; bird watching; stargazing; keeping a diary; collecting shells; cycling to work; \
growing herbs; compost; rain barrels; a stormy night; a missing letter; an honest thief; a clever fox; \
a haunted library; a time machine; a broken promise; an unexpected guest; two rival bakers; a message \
in a bottle; the last train home; a painter who cannot see colours; a dog who saves the day"""

HELD_TOPICS = """kites; lighthouses; tornadoes; the trombone; goats; rice; glaciers; postal services; \
gratitude; a clumsy wizard; escalators; the French Revolution; soccer coaches; noise; windows; \
mushrooms; elections; a blue umbrella; sailing; jealousy"""

TEMPLATES = {
    "explain": """Explain {topic} to a child.
Explain the basics of {topic}.
What should I know about {topic}?
Give a short introduction to {topic}.
Tell me about {topic}.
Explain why {topic} can be important, in simple words.
What are some common misunderstandings about {topic}?
Describe {topic} in {n} sentences.
I am new to {topic}. Where do I start?
Give me an overview of {topic} for a presentation.""",
    "story": """Write a short story about {topic}.
Tell me a bedtime story about {topic}.
Write a funny story about {topic}.
Write the opening paragraph of a novel about {topic}.
Write a story about {topic} that begins with the words "It was late in {city}".
Write a story in which {name} learns something from {topic}.
Continue this story: {name} had never thought much about {topic}. But that morning, everything changed.""",
    "list": """List five facts about {topic}.
Give me ten tips about {topic}.
What are the advantages and disadvantages of {topic}?
List {n} reasons to care about {topic}.
Give {n} questions someone could ask about {topic}.
What are {n} interesting books or articles one could write about {topic}?
Suggest {n} names for a club about {topic}.
Give me a bulleted list of words related to {topic}.""",
    "howto": """Give step-by-step advice for a beginner interested in {topic}.
How can I learn more about {topic}?
Write a simple guide to {topic}.
How do experts study {topic}?
How would I teach {topic} to a group of {n} students?
What tools or materials do I need for {topic}?
How do I avoid problems with {topic}?""",
    "letter": """Write an email to a friend about {topic}.
Write a letter to a teacher about {topic}.
Write a formal letter to the mayor of {city} about {topic}.
Write a short thank-you note to {name}, who helped me with {topic}.
Write an invitation to an event about {topic} in {city}.
Write an email to my boss {name} asking for time off because of {topic}.
Write a complaint to a company about {topic}.""",
    "write": """Write a blog post about {topic}.
Write a product description related to {topic}.
Write a speech about {topic}.
Write an essay about {topic}.
Write a press release about {topic}.
Write a review of a film about {topic}.
Write an advertisement for a course about {topic} in {city}.
Write a diary entry of {name}, who spent the day thinking about {topic}.
Write three social media posts about {topic}.
Write a good title and a summary for an article on {topic}.""",
    "poem": """Write a poem about {topic}.
Write a haiku about {topic}.
Write song lyrics about {topic}.
Write a rhyming poem for children about {topic}.
Write a limerick about {topic}.
Write a sad poem about {topic} and {topic2}.""",
    "dialogue": """Write a dialogue between two friends about {topic}.
Write an interview with an expert on {topic}.
Write a conversation between {name} and {name2}, who disagree about {topic}.
Write a scene of a play in which {name} talks to a stranger about {topic}.
Write a phone call between a customer and a shop about {topic}.""",
    "python": """Write a Python function that works with a list of {topic}.
Write a Python class that models {topic}.
Write a Python script that reads a CSV file about {topic} and prints the average.
Write a Python function that counts how often "{topic}" occurs in a text.
Write a Python program that asks the user {n} questions about {topic}.
Write a unit test in Python for a function about {topic}.
Write a Python function with type hints and a docstring that sorts records about {topic} by date.
Explain what this code does:

def f(items):
    result = []
    for item in items:
        if item > {a}:
            result.append(item * {b})
    return result""",
    "code": """Write a SQL query for a table about {topic}.
Write a small HTML page about {topic}.
Write a JavaScript program that shows a list of {topic}.
Write a Java class for {topic}.
Write a C program that stores the names of {topic} in an array.
Write CSS for a web page about {topic}.
Write a SQL statement that creates a table for {topic} with {n} columns.
Write a C++ function that prints {topic} in reverse order.
Write a Go struct for {topic} and a method for it.
Write a Rust function that filters a vector of {topic}.""",
    "question": """Why are people interested in {topic}?
What is the history of {topic}?
What is the most important thing about {topic}?
How has the view of {topic} changed over time?
Is it true that everyone likes {topic}? Answer in one paragraph.
What is the connection between {topic} and {topic2}?
Who was important in the history of {topic}?
What would happen if {topic} disappeared tomorrow?
Do you think {topic} will matter in {a} years?
What does {topic} have to do with {city}?""",
    "edit": """Correct the grammar: "{topic} is very interesting and I likes it since many year."
Rewrite in a formal style: "Hey, I think {topic} is super cool and you should check it out."
Fix the spelling and grammar of this text.

{wrong}
Rewrite this text so that it is shorter.

{passage}
Make this text more friendly.

{passage}
Rewrite this text in the past tense.

{passage}
Improve the style of the following text about {topic}.

{passage}
Repeat this text word for word.

{passage}""",
    "summary": """Summarize this: "{passage}"
Summarize the following text in one sentence.

{passage}
What are the key points of this text?

{passage}
Give this text a title and explain your choice.

{passage}""",
    "translate": """Translate to French: "I want to learn about {topic}."
Translate to Spanish: "My friend {name} from {city} likes {topic}."
Translate this sentence into German: "There are {a} books about {topic} in the library."
How do you say "{topic}" in Italian?""",
    "extract": """List all names and places in this text.

{passage}
Extract the numbers from this text and say what they mean.

{passage}
Who is mentioned in this text, and what do they do?

{passage}
Answer the question from the text.

{passage}

Question: Where does {name} live?""",
    "maths": """If I have {a} books about {topic} and buy {b} more, how many do I have?
A shop sells {a} items about {topic} for {b} dollars each. What is the total price?
{name} has {a} coins and gives {n} to {name2}. How many are left?
What is {a} times {b}? Show the steps.
Solve for x: {n}x + {a} = {b}.
A train to {city} travels {a} miles an hour for {n} hours. How far does it go?
What is {a} percent of {b}00?
The sides of a rectangle are {a} and {b} cm. What are its area and perimeter?
{name} reads {n} pages about {topic} every day. How long does a book of {a}{b} pages take?
Put these numbers in order: {a}, {b}, {n}, {a}{n}, {b}{n}.""",
    "compare": """Compare {topic} and {topic2}.
Which is more useful, {topic} or {topic2}? Give reasons.
What do {topic} and {topic2} have in common?
Make a table that compares {topic} with {topic2}.
I have to choose between {topic} and {topic2} for my school project. What do you advise?""",
    "plan": """Plan a one-day workshop about {topic}.
Make a lesson plan about {topic} for {n} hours.
Plan a weekend in {city} for {name}, who loves {topic}.
Make a schedule for a week in which I want to learn about {topic}.
Make a checklist for a project about {topic}.
Outline a book about {topic} with {n} chapters.""",
    "roleplay": """You are a tour guide in {city}. Tell me about {topic}.
Pretend to be {topic} and introduce yourself.
You are a grumpy old professor. Explain {topic}.
Act as a job interviewer for a position that has to do with {topic}. Ask me {n} questions.
You are {name}, a reporter in {city}. Report on {topic}.
Imagine you are a visitor from space and see {topic} for the first time. What do you think?""",
    "classify": """Is this sentence positive or negative? "I was very disappointed by {topic}."
Is this sentence positive, negative or neutral, and why? "{name} says that {topic} made this summer in {city} wonderful."
Sort these words into groups: {topic}, {topic2}, {city}, {name}.
Which of these does not belong with the others: {topic}, {topic2}, arithmetic? Explain.
To which school subject does "{topic}" belong? Explain.""",
    "json": """Write a JSON object that describes {topic}.
Turn this into JSON: {name}, {a} years old, from {city}, likes {topic}.
Make a JSON list with {n} entries about {topic}, each with a name and a description.
Write a YAML configuration for an application about {topic}.
Write a Markdown table with {n} rows about {topic}.""",
    "help": """I feel overwhelmed by {topic}. What can I do?
My friend {name} only talks about {topic}. What should I say?
I had an argument about {topic} with {name}. How do I apologise?
What gift would you give someone who loves {topic}?
I have {a} dollars and {n} days. What can I do about {topic} in {city}?""",
}
"""Templates by kind of task: one begins at each line that does not follow an empty one."""

FOLLOW_UPS = """Can you make it shorter?
Can you explain that in more detail?
Give me an example.
Thank you! What else should I know?
Rewrite it for a child.
Why?
Now say it in one sentence.
Can you turn this into a list?
What is the most important point?
Write it again in a more formal style.
I do not understand the first part. Can you explain it again?
Are you sure?
Add more details.
What would be the opposite view?
Give me three more.
Translate it into French.
Can you give me a summary of what you just said?
How does that apply to {topic}?
And what about {topic}?
Now do the same for {topic}."""

STARTERS = """What is; What are; What does; What would; What should I; What can I; What kind of; Which; Who was; \
Who is; When did; Where can I; Where is; Why do; Why does; Why is; Why are; How do I; How can I; How \
does; How many; How much; How long; How would you; How did; Is it; Is there; Are there; Do you; Does; \
Did; Can I; Can you; Can you explain; Can you help me; Could you; Should I; Would you; Please; Please \
write; Please explain; Write a; Write an; Write a short; Write code; Write a Python function; Write a \
story; Write a poem; Create a; Create an; Make a; Give me; Give me some; Give an example; List; List \
the; Name; Describe; Describe the; Explain; Explain the; Explain how; Tell me; Tell me about; Summarize; \
Compare; Suggest; Recommend; Find; Calculate; Solve; Convert; Translate; Rewrite; Edit; Correct; \
Design; Develop; Plan; Help me; I am; I'm; I have; I need; I want; I want to; I was; I would like; \
I'd like; I've been; My; My friend; My son; We are; We have; There is; In the; If; If I; If a; Imagine; \
Pretend; Act as; You are; Let's; Hi; Hello; Hey; Thanks; As a; For my; Given; Use; Using; Identify; \
Define; Discuss; Analyze; Provide; Generate; Compose; Draft; Classify; Sort; Show me; Teach me; Consider; \
Choose; Answer; Complete; Continue; Fix; Simplify; Outline; Propose; A; An; The; One; Two; This; It; \
Some people; Many; Today; Yesterday; Once; Every; When I; While; After; Before; Since; Although"""
"""How messages begin that the model makes up: left to itself it writes anything but requests."""

_NAMES = """Anna Tomas Mary Luis Ingrid Kenji Fatima Paul Elena Omar Grace Viktor Lucy Samuel Priya \
Daniel Chloe Ahmed Sofia Peter Nadia James Mei Carlos Emma Ivan Ruth Hassan Julia David""".split()
_CITIES = """London, Berlin, Cairo, Lima, Toronto, Mumbai, Oslo, Madrid, Nairobi, Sydney, Boston, \
Lisbon, Seoul, Vienna, Chicago, Athens, Dublin, Prague, Warsaw, Hanoi""".split(", ")
_SENTENCES = """Many people care about {topic}.
Some have studied {topic} for years, and others only heard of it recently.
Last year, {name} from {city} opened a small museum about {topic}.
About {a} percent of the people in {city} say that they know a lot about {topic}.
A new study shows that {topic} may be related to {topic2}.
{name} thinks that {topic} is more important than {topic2}, but {name2} does not agree.
The first book about {topic} was printed in {city} more than {a} years ago.
In the morning, {name} reads the news, drinks a cup of tea and thinks about {topic}.
Every summer, {a}0 visitors come to {city} to learn about {topic}.
{name2} works in {city} and writes about {topic} for a newspaper.
The price of tickets rose from {n} to {a} dollars.
Nobody expected that {topic} would become so popular.
The city council will discuss {topic} at its next meeting.
There are good reasons to be careful, because not everything that is said about {topic} is true.
{name} bought {n} books and {b} postcards.
Teachers in {city} use {topic} to explain {topic2}.
The weather was cold, so the meeting about {topic} took place inside.
In the end, most agree that {topic} will matter in the future.
It took {name2} {a} weeks to finish the report.
Children often ask what {topic} means.""".splitlines()
_MISTAKES = (
    ("people", "poeple"),
    ("about", "abuot"),
    ("that", "taht"),
    ("because", "becuase"),
    ("their", "there"),
    (" is ", " are "),
    (" the ", " teh "),
    ("will", "wil"),
    ("thinks", "think"),
    ("more", "moer"),
    ("years", "year"),
    ("says", "say"),
)

HELD_TEMPLATES = {
    "describe": "Describe {topic} for someone who has never heard of it.",
    "mystery": "Write a mystery that involves {topic}.",
    "mistakes": "Name four frequent mistakes with {topic} and how to avoid them.",
    "news": "Write a newspaper article on {topic}, with a headline.",
    "typescript": "Define a TypeScript interface for {topic} and use it.",
    "without": "What would the world be like without {topic}?",
    "longer": 'Make this sentence longer: "{topic} can change your life."',
    "quiz": "Make a multiple-choice quiz on {topic} with the answers at the end.",
    "metaphor": "Find a metaphor for {topic} and explain it.",
    "opinion": "Argue for and against a ban on {topic}.",
    "riddle": "Make up a riddle whose answer is {topic}.",
    "proverb": "Invent a proverb that mentions {topic}.",
    "recipe": "Invent a recipe inspired by {topic}.",
    "tweet": "Answer an angry comment on {topic} politely.",
    "acronym": "Make an acronym from the first letters of {topic}.",
    "shell": "Show shell commands that organise a folder of pictures of {topic}.",
    "debate": "Give the closing statement of a debate on {topic}.",
    "glossary": "Define six terms that come up when one reads on {topic}.",
    "toast": "Propose a toast in honour of {topic}.",
}

HELD_FREE = """Why is the sky blue, and why is it red in the evening?
I can't decide between two job offers: one pays more, the other is closer to home. Help me think.
What is the difference between a virus and a bacterium?
My sourdough does not rise although I feed the starter daily. What could be wrong?
Who wrote Hamlet, and what is it about?
Convert to CSV with a header line: apple 3, pear 5, plum 7.
What does the proverb "a stitch in time saves nine" mean?
Draft an apology to a customer whose parcel came two weeks late.
My laptop won't turn on after I spilled water on it. What now?
Which planets can be seen without a telescope?
How many legs do three spiders and two ants have together?
Name the capital cities of Norway, Kenya, Peru and Vietnam.
What is the past participle of "swim", "begin" and "fly"? Use each in a sentence.
Explain the offside rule.
Is a tomato a fruit or a vegetable? Settle it for my brother and me.
def add(a, b): return a - b. My test says that 2 and 2 give 0. Find the bug.
Complete the series and say how you got it: 2, 6, 12, 20, 30.
I am vegetarian and have rice, eggs, spinach and a lemon. What can I cook tonight?
What happened in 1969 that people still talk about?
Say "good morning, how are you?" in as many languages as you can.
Turn this into a polite request: Send me the file now!""".splitlines()


def topics() -> list[str]:
    """Return the topics of the training prompts."""
    return TOPICS.split("; ")


@functools.cache
def templates() -> list[tuple[str, str]]:
    """Return all training templates, each with its kind of task."""
    return [
        (task, template)
        for task, text in TEMPLATES.items()
        for template in re.split(r"(?<!\n)\n(?=[^\n ])(?!def)(?!Question)", text)
    ]


def trained(index: int) -> Asked:
    """Return training prompt ``index`` of an endless list.

    Every stretch of it holds all templates equally often.
    """
    every = templates()
    lap, at = divmod(index, len(every))
    order = random.Random(f"order {lap}").sample(range(len(every)), len(every))
    task, template = every[order[at]]
    return Asked(task, "train", _fill(template, topics(), random.Random(f"fill {index}")))


def starter(index: int) -> str:
    """Return how the message of conversation ``index`` begins that the model makes up."""
    return random.Random(f"starter {index}").choice(STARTERS.split("; "))


def follow_up(index: int) -> str:
    """Return what the user says next in the conversation that training prompt ``index`` begins."""
    chance = random.Random(f"follow {index}")
    return _fill(chance.choice(FOLLOW_UPS.splitlines()), topics(), chance)


@functools.cache
def held_out() -> tuple[Asked, ...]:
    """Return the prompts for evaluation: unseen topics, unseen tasks, and unlike the data."""
    unseen, seen = HELD_TOPICS.split("; "), topics()
    tasks, found = list(TEMPLATES), []
    for index in range(20):
        chance = random.Random(f"held {index}")
        task = tasks[index % len(tasks)]
        of_task = [template for kind, template in templates() if kind == task]
        usable = [template for template in of_task if "{topic}" in template]
        chosen = chance.choice(usable or of_task)
        found.append(Asked(task, "topic", _fill(chosen, [unseen[index]], chance)))
    for index, (task, template) in enumerate(HELD_TEMPLATES.items()):
        chance = random.Random(f"held task {index}")
        text = _fill(template, seen if index % 2 else unseen, chance)
        found.append(Asked(task, "task", text))
    return (*found, *(Asked("free", "free", text) for text in HELD_FREE))


def resembles_held_out(text: str) -> bool:
    """Return whether a prompt is a held-out one, or shares most of its word triples with one.

    Training prompts share their templates with the held-out ones of group `topic`: they count as
    alike only when they name the topic as well.
    """
    words = _words(text)
    if tuple(words) in _held_texts():
        return True
    triples = _triples(words)
    return any(
        needed <= set(words) and len(triples & held) >= 0.6 * min(len(triples), len(held))
        for held, needed in _held_triples()
        if triples and held
    )


@functools.cache
def _held_texts() -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(_words(asked.text)) for asked in held_out())


@functools.cache
def _held_triples() -> list[tuple[frozenset[tuple[str, ...]], set[str]]]:
    unseen = HELD_TOPICS.split("; ")
    found = []
    for index, asked in enumerate(held_out()):
        needed = _words(unseen[index]) if asked.group == "topic" else []
        found.append((_triples(_words(asked.text)), set(needed)))
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _triples(words: list[str]) -> frozenset[tuple[str, ...]]:
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def _fill(template: str, about: list[str], chance: random.Random) -> str:
    """Fill the blanks of a template; texts about the topic are made of sentences of their own."""
    topic = chance.choice(about)
    other = chance.choice([one for one in topics() if one != topic])
    name, name2 = chance.sample(_NAMES, 2)
    blanks: dict[str, object] = {
        "topic": topic,
        "topic2": other,
        "name": name,
        "name2": name2,
        "city": chance.choice(_CITIES),
        "n": chance.randint(3, 9),
        "a": chance.randint(11, 98),
        "b": chance.randint(11, 98),
    }
    sentences = chance.sample(_SENTENCES, chance.randint(3, 6))
    passage = " ".join(_capital(sentence.format(**blanks)) for sentence in sentences)
    wrong = passage
    for right, mistake in chance.sample(_MISTAKES, 6):
        wrong = wrong.replace(right, mistake, 1)
    return template.format(**blanks, passage=passage, wrong=wrong)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
