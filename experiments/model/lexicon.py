"""The words and sentence patterns from which the corpus is written.

Owns vocabulary only, no randomness and no tasks. Pools that serve as subjects or answers of facts hold
words that the tokenizer keeps whole, so that looking one up is one step of attention.
"""

POOLS = {
    "name": """Ada Adam Agnes Alan Alba Alma Amir Ana Anton Arno Asha Bella Bena Boris Bruno Carla Carmen Cedric
        Chen Clara Dana Daria David Dora Edgar Elena Elif Emil Emma Erik Esra Eva Fatima Felix Fiona Flora Frank
        Gina Greta Hana Hugo Ida Igor Ines Irma Ivan Jana Jonas Josef Julia Kamal Karin Kenji Lara Laila Leon
        Lena Lin Lucas Luisa Maja Marco Maria Marta Max Mina Mira Nadia Nils Nina Noah Nora Olga Omar Oscar
        Otto Paula Pedro Petra Rana Rosa Ruth Samir Sara Selma Simon Sofia Sven Tara Theo Tina Tomas Ursula
        Vera Viktor Yara Yusuf Zoe""",
    "city": """Lima Oslo Paris Rome Cairo Delhi Tokyo Seoul Berlin Vienna Madrid Lisbon Dublin London Athens
        Prague Warsaw Riga Bergen Geneva Milan Naples Turin Porto Seville Lyon Nice Basel Zurich Hamburg Munich
        Dresden Krakow Sofiana Ankara Izmir Tunis Rabat Accra Lagos Nairobi Durban Quito Bogota Havana Boston
        Denver Dallas Austin Chicago Seattle Toronto Ottawa Perth Sydney Hanoi Manila Osaka Kyoto Dakar Malmo
        Tampere Leeds Bristol""",
    "company": """Acme Borealis Cobalt Delphi Everest Fjord Galaxy Helios Indigo Jupiter Kestrel Lumen Meridian
        Nimbus Orion Pegasus Quasar Raven Saturn Titan Umbra Vega Westwind Xenon Yukon Zenith Argon Beacon
        Cascade Dynamo Eclipse Falconer Granite Horizon Iris Juniper Krypton Lotus Magnet Nexus""",
    "object": """lamp clock mirror kettle basket blanket hammer ladder guitarcase suitcase candle bottle carpet
        cushion drawer envelope fan globe helmet jar key kite lantern map needle notebook oven pillow plate
        radio ring rope saddle scarf shovel spoon statue stool sword table teapot telescope tent ticket towel
        trumpetbox umbrella vase violincase wagon wallet wheel whistle compass""",
    "animal": """cat dog parrot rabbit turtle goat horse pony lizard hamster ferret canary pigeon goose duck snake
        spider frog mouse hedgehog falcon raven owl fox badger beaver otter wolf bear lynx""",
    "instrument": """piano violin cello flute guitar harp drum trumpet banjo clarinet oboe accordion organ
        saxophone mandolin tuba bassoon trombone viola lute""",
    "food": """rice soup bread cheese pasta fish salad curry pizza cake honey beans lentils mushrooms noodles
        pancakes potatoes porridge dumplings stew tomatoes olives plums cherries""",
    "job": """baker teacher doctor farmer nurse painter lawyer tailor pilot sailor butcher carpenter plumber judge
        writer singer dancer driver gardener barber librarian clerk waiter miner potter weaver mechanic chemist
        guard translator""",
    "colour": "red blue green yellow white black brown grey pink purple orange silver golden violet amber crimson",
    "place": """market station library museum harbour school bakery theatre hospital garden bridge castle church
        factory farm forest hotel kitchen lake mill office park post restaurant river square stadium tower
        village workshop""",
    "quality": """amber bitter brave bright broad calm clever cold crisp dark deep dusty early empty fair fierce
        gentle giant hollow humble icy jolly keen late lively lonely loud lucky mellow misty narrow noble old
        plain proud quick quiet rapid rare rough royal rusty sharp shy silent silver simple slow small smooth
        solid strange sweet swift tall tender tiny vivid warm wild wise young""",
    "noun": """anchor arrow autumn barrel beetle branch button canyon cloud comet copper coral cotton desert dragon
        ember feather flame forest fountain glacier hammer harvest island ivory jungle kettle lantern lemon marble
        meadow mirror mountain ocean orchard paper pebble pepper planet rocket saddle shadow signal spiral spring
        stone storm summer sunset thunder timber tunnel valley velvet walnut whale willow window winter zebra""",
    "weather": "rain snow wind fog sunshine thunder hail frost heat mist",
    "time": "morning afternoon evening night spring summer autumn winter weekend holiday",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "move": "walked hurried cycled drove strolled returned travelled ran",
    "manner": "slowly quickly quietly happily carefully reluctantly early late again alone together",
    "act": """cleaned repaired painted sold borrowed admired dropped carried packed moved washed measured hid
        polished examined lifted""",
    "feel": "happy tired curious proud nervous hungry cheerful bored thankful worried",
    "label": """alpha beta gamma delta epsilon zeta theta kappa lambda sigma omega north south east west ruby jade
        onyx pearl opal topaz quartz""",
}
POOLS = {pool: tuple(words.split()) for pool, words in POOLS.items()}
POOLS["letter"] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

# Prose between the facts. None of these patterns states a relation that a task asks about.
FILLER = """
{name} {move} to the {place} in the {weather}.
{name} {move} {manner} past the {place}.
On {day} {name} {act} the {object} and felt {feel}.
The {place} was {quality} that {time}.
In the {time} the {weather} made the {place} look {quality}.
{name} and {name} met near the {place} on {day}.
A {quality} {animal} slept beside the {place}.
The {job} from the {place} {act} a {quality} {object}.
{name} ordered {food} and {food} for lunch.
Nobody knew why the {job} {act} the {object} so {manner}.
The {weather} lasted until {day}.
{name} was {feel} because of the {weather}.
Two {quality} boats crossed the {place} in the {time}.
Every {time} the {job} told a {quality} story about a {animal}.
{name} found a {object} behind the {place}, next to a {colour} {object}.
The children {move} home {manner} when the {weather} came.
It was a {quality} {time}, and the {place} smelled of {food}.
{name} asked the {job} about the {quality} {object}.
A train to the {place} left {manner} on {day}.
{name} wrote a letter about the {weather} and the {animal}.
The {colour} {object} stood in the {place} for years.
After the {weather}, {name} {move} to the {place} with {name}.
The {job} and the {job} shared a plate of {food}.
Old {name} never liked the {weather} in the {time}.
Someone had {act} the {object} near the {quality} {place}.
{name} felt {feel} all {day}.
The {animal} ran {manner} through the {place}.
By {day} the {quality} {place} was full of people.
{name} bought a {colour} {object} at the {place}.
Nothing but {food} was on the table, and the {weather} went on.
""".strip().splitlines()

# relation: (pool of subjects, pool of objects, ways to state it, the question)
RELATIONS = {
    "home": (
        "name",
        "city",
        ("{a} lives in {b}.", "{a} has a small flat in {b}.", "For years {a} has lived in {b}."),
        "In which city does {a} live?",
    ),
    "employer": (
        "name",
        "company",
        ("{a} works for {b}.", "{a} has a job at {b}.", "Since last year {a} works for {b}."),
        "For which company does {a} work?",
    ),
    "pet": ("name", "animal", ("{a} keeps a pet {b}.", "{a} has a {b} at home."), "Which animal does {a} keep?"),
    "music": (
        "name",
        "instrument",
        ("{a} plays the {b}.", "{a} learned to play the {b}."),
        "Which instrument does {a} play?",
    ),
    "trade": ("name", "job", ("{a} is a {b}.", "{a} earns a living as a {b}."), "What is the job of {a}?"),
    "meal": (
        "name",
        "food",
        ("{a} loves to eat {b}.", "The favourite food of {a} is {b}."),
        "What is the favourite food of {a}?",
    ),
    "door": (
        "name",
        "colour",
        ("{a} has a {b} front door.", "The front door of {a} is {b}."),
        "Which colour is the front door of {a}?",
    ),
    "office": (
        "company",
        "city",
        ("The head office of {a} is in {b}.", "{a} has its head office in {b}."),
        "In which city is the head office of {a}?",
    ),
    "owner": ("object", "name", ("The {a} belongs to {b}.", "The owner of the {a} is {b}."), "Who owns the {a}?"),
    "friend": (
        "name",
        "name",
        ("The best friend of {a} is {b}.", "{a} has a best friend, {b}."),
        "Who is the best friend of {a}?",
    ),
}

# (first relation, second relation, question about the subject of the first whose answer is the object of the second)
CHAINS = (
    ("employer", "office", "In which city does {a} work?"),
    ("friend", "home", "In which city does the best friend of {a} live?"),
    ("friend", "music", "Which instrument does the best friend of {a} play?"),
    ("owner", "home", "In which city does the owner of the {a} live?"),
    ("owner", "employer", "For which company does the owner of the {a} work?"),
)

# topic: (things, what they did); a text to classify is one of each, with a name or a day around it
TOPICS = {
    "sport": ("team goalkeeper runner coach match race", "scored won trained lost sprinted tackled"),
    "cooking": ("soup recipe chef sauce dough oven", "boiled baked tasted simmered fried melted"),
    "money": ("bank loan price tax budget salary", "rose fell doubled shrank paid cost"),
    "sky": ("cloud storm breeze rainbow frost sun", "drifted cleared rained froze shone thundered"),
    "health": ("doctor patient fever medicine nurse cough", "healed recovered coughed rested prescribed ached"),
    "travel": ("train passport ticket airport journey luggage", "departed arrived boarded landed crossed packed"),
    "song": ("choir melody concert drummer chorus tune", "sang played hummed echoed performed applauded"),
    "study": ("pupil lesson exam teacher homework class", "learned read studied passed graded explained"),
}
TOPICS = {topic: (things.split(), deeds.split()) for topic, (things, deeds) in TOPICS.items()}
