"""The frames: every sentence that the story world can tell, with what it does to the world.

A group is a heading `## name | effects` followed by one template a line. The generator tells from this table and the
judge parses with it. The effects, separated by commas, are the methods of world.World of the same names.

Slots
    {P} the subject, {Q} another person, {O} an object, {A} an animal, {L} a place, {it} the object last spoken of;
    {P+} a person who enters here, {P!} a person called by name and never by a pronoun, {P*} the subject in object
    position (him, her), as {Q} always is;
    {he} {his} {boy} {child} agree with {P};
    every other slot is a list of decor words (lexicon.DECOR).

A literal `a` before a slot becomes `an` where needed. "a {A}" means the effect meet and "the {A}" near, "the {O}" know
and "{his} {O}" use, where the group states no effect on the animal or object. `they` needs two people.

This file holds the beginnings and ends of stories, frames_middle.py the rest.
"""

BEGINNINGS = """
## open.plain |
{P+} was a {kind} {boy}.
{P+} was a {kind} and {kind} {boy}.
Once there was a {kind} {boy} named {P+}.
There once was a {boy} called {P+}.
{P+} lived in a {look} house with {his} {relative}.
{P+} liked {hobby} more than anything.
{P+} wanted to be a {job} one day.
{P+} was {number} years old.
{P+} woke up early on {weekday}.
{P+} came from {land} with {his} {relative}.
One {weather} {daytime}, {P+} felt {mood}.
On {weekday}, {P+} had no {lesson} class.
It was {month}, and {P+} felt {mood}.
Last {season}, {P+} was very {mood}.
{P+} loved {food} with {drink}.
{P+} was the {child} of a {job}.
Long ago, there lived a {kind} {boy} named {P+}.
Every {season}, {P+} visited {his} {relative}.

## open.have | have P O
{P+} had a {look} {O}.
{P+} had a {color} {O}.
{P+} got a {O} from {his} {relative}.
One {daytime}, {P+} made a {O} of {stuff}.
{P+} bought a {O} on {weekday}.
In {month}, {P+} won a {O}.
A {kind} {boy} named {P+} had a {O}.
{P+} owned a {O} made of {stuff}.

## open.want | want P O
{P+} always wanted a {look} {O}.
{P+} dreamed of a {color} {O}.
{P+} needed a {O} for {his} {relative}.
More than anything, {P+} wished for a {O}.

## open.place | go P L
One {weather} {daytime}, {P+} went to the {L}.
On {weekday}, {P+} walked to the {L}.
{P+} {moved} to the {L} with {his} {relative}.
Last {season}, {P+} went to the {L}.
{P+} took a {ride} to the {L}.

## open.at | at L
{P+} lived near the {L}.
{P+} was alone at the {L}.
It was {weekday}, and {P+} was at the {L}.
{P+} {rested} by the {L}.

## open.animal |
{P+} had a {trait} {A}.
One {daytime}, {P+} met a {trait} {A}.
{P+} lived with a {trait} {A}.
{P+} took care of a {A}.
On {weekday}, {P+} saw a {color} {A}.
"""

ENDS = """
## turn.happy |
Suddenly, {P} had a wonderful {puzzle}.
Then something good happened.
The {job} said that {P} had won.
In the end, everything was fine.
The {job} gave {P*} a big hug.

## turn.sad |
Then something bad happened.
Soon it began to rain very hard.
The {job} said that {P} had to go.
But nobody came to help {P*}.
In the end, everything went wrong.

## turn.surprising |
Suddenly, there was a loud {noise}.
Then something very odd happened.
All at once, the sky turned {color}.
Suddenly, the ground began to shake.
Then a door opened behind the {spot}.

## close.happy |
{P} smiled all the way home.
{P} was very happy.
{P} went to bed with a big smile.
It was the best {daytime} ever.
{P} felt happy and proud.
Everyone cheered for {P*}.
{P} had never been so happy.
{P} danced with joy.
{P} laughed and clapped {his} hands.
"This is the best {daytime} of my life," {P} said.
"I am so happy," {P} {said}.
What a lovely {daytime} it was!
{P} lived happily ever after.
{P} and {his} {relative} laughed with joy.
From then on, {P} was happy.

## close.happy.two |
{P} and {Q!} laughed and hugged.
{P} gave {Q} a happy hug.
{P} was glad to have a friend like {Q!}.
"You are my best friend," {P} told {Q}.
They all lived happily ever after.
They were friends forever.

## close.happy.use | use P O
{P} hugged the {O} and smiled.
{P} was happy with {his} {O}.
The {O} made {P*} very happy.

## close.happy.animal |
{P} hugged the {A} and smiled.
The {A} made {P*} very happy.
{P} and the {A} were happy together.

## close.sad |
{P} cried all {daytime}.
{P} was very sad.
{P} walked home with tears in {his} eyes.
It was a sad {daytime} for {P*}.
{P} went to bed crying.
{P} felt sad and alone.
{P} had never been so sad.
{P} sat down and wept.
"I am so sad," {P} {said}.
"This is the worst {daytime} of my life," {P} said.
Tears ran down the face of {P!}.
Nobody could cheer {P*} up.
{P} went home with a heavy heart.
From then on, {P} was sad.

## close.sad.two |
{P} never played with {Q} again.
{P} and {Q!} were both sad.
{P} cried, and {Q!} cried too.
They were sad for a long time.

## close.sad.lost | seek P O
{P} never saw the {O} again.
{P} cried because the {O} was lost.
The {O} was gone forever, and {P} wept.

## close.sad.away | miss A
{P} never saw the {A} again.
{P} missed the {A} and wept.

## close.surprising |
It had all been a dream!
{P} could not believe {his} eyes!
Nobody could believe it!
What a surprise for {P*}!
{P} was really a {royal} all along!
"Surprise!" everyone shouted at {P*}.
"I am really a {royal}!" {P} {said}.
To the surprise of {P!}, it was magic!
{P} turned into a {royal}!
And then {P} began to fly!
Nobody ever found out why!
It was really a {job} from the moon!
{P} never guessed that it was magic!
"How can this be?" {P} asked in surprise.

## close.surprising.two |
"Surprise!" {Q!} shouted at {P*}.
"I am really a {royal}!" {Q!} told {P*}.

## close.surprising.use | use P O
The {O} of {P!} turned into gold!
Suddenly, the {O} of {P!} began to talk!
Inside the {O} of {P!} was real gold!

## close.surprising.animal |
The {A} began to talk to {P*}!
The {A} was really a {royal}!
Suddenly, the {A} turned into a {royal}!
"I am really a {royal}!" said the {A}.
"""
