"""The frames that stories are made of between beginning and end; frames.py says how to read them."""

MIDDLES = """
## mid.plain |
{P} was a little {mood}.
{P} put on {his} {color} {wear}.
{P} wore {feet} and a {wear}.
{P} ate some {taste} {food}.
{P} drank a glass of {drink}.
{P} {moved} {manner} down the road.
{P} sat under the {tree} tree.
{P} looked up at the {sight}.
{P} {hurt} {his} {body}.
{P} sang a song about the {sight}.
{P} picked some {flower} for {his} {relative}.
{P} did the {chore} with {his} {relative}.
{P} learned {lesson} for a {length}.
{P} waited for a {length}.
{P} thought about {his} {relative}.
{P} counted to {number}.
{P} heard a loud {noise}.
{P} told a {puzzle} about a {job}.
{P} hid behind the {spot}.
{P} climbed over the {spot}.
{P} wanted to be {kind}.
{P} needed some {virtue}.
{P} practiced {hobby} all {daytime}.
{P} washed {his} {body} with {drink}.
{P} talked to a {kind} {job}.
{P} helped the {job} with the {ride}.
{P} {said} {manner}.
{P} asked the {job} for help.
{P} dug a hole under the {tree} tree.
{P} played {game} all {daytime}.
{P} {moved} past the {look} {ride}.
{P} wrote a {puzzle} about {flower}.
{P} forgot about the {chore}.
{P} lost a game of {game}.
{P} watched the {sight} for a {length}.
The {sight} looked {color} that {daytime}.
The {weather} {daytime} made {P*} {mood}.
It was getting {weather} outside.
There was a {noise} behind the {spot}.
The {job} gave {P*} some {food}.
{P} shared the {food} with a {job}.
{P} felt something touch {his} {body}.
{P} fell asleep under the {spot}.
{P} took a deep breath.
{P} closed {his} eyes and made a wish.
{P} brushed {his} teeth and washed {his} face.
{P} made {food} with {his} {relative}.
{P} baked {food} for the {job}.
{P} drew a {job} on the {spot}.
{P} followed the footprints in the {sight}.

## mid.talk |
"I love {hobby}," {P} said.
"It is so {weather} today," {P} {said}.
"I am {mood}," {P} {said}.
"My {body} hurts," {P} {said}.
"Let us play {game}," {P} said.
"What should I do now?" {P} asked.
"I want some {food}," {P} said.
"We must be {kind}," {P} {said}.
"Do not be {mood}," said the {job}.
"Can you help me?" {P} asked the {job}.
"Good {daytime}," said the {job}.
"I have {number} {food}," {P} {said}.
"Where is my {relative}?" {P} asked.
"The {sight} will come soon," said the {job}.
"Look at the {sight}!" {P} {said}.
"Wow!" {P} {said}.
"Please wait a {length}," said the {job}.
"I will try again," {P} {said}.
"Write a story about {hobby}," said the {job}.
"Tell me a story about the {sight}," {P} said.
"That is surprising," {P} {said}.
"I like stories about {flower}," {P} {said}.
"Nothing is impossible," {P} {said}.

## meet.friend |
{P} met {Q+} on the way.
{P} had a friend named {Q+}.
A {kind} {job} named {Q+} came by.
Then {Q+} came along.
{P} called {his} friend {Q+}.
{P} played {game} with {Q+}.
{P} saw {Q+} near the {spot}.
Soon {Q+} came to help.
{P} asked {Q+} for some {virtue}.
{P} and {Q+} were best friends.
"Hello, {Q+}!" {P} {said}.
"I am {Q+}," said a {kind} voice.
{Q+} lived next door and came over.

## mid.two |
{P} {said} {manner} to {Q}.
{P} told {Q} a {puzzle}.
{P} helped {Q} with the {chore}.
{P} gave {Q} some {food}.
{P} and {Q!} played {game}.
{P} and {Q!} ate {food} together.
{P} taught {Q} about {lesson}.
{P} raced {Q} to the {spot}.
{P} danced with {Q} under the {sight}.
{P} took {Q} by the {body}.
{P} thanked {Q} for the {food}.
{P} followed {Q} to the {ride}.
{P} shared a {puzzle} with {Q}.
{P} showed {Q} how to play {game}.
{P} sat with {Q} by the {spot}.
{P} waved at {Q} from the {ride}.
"Are you {mood}?" {P} asked {Q}.
"You are very {kind}, {Q!}," {P} said.
"Follow me, {Q!}!" {P} {said}.
"Thank you," {P} said to {Q}.
"Do you like {food}?" {P} asked {Q}.
"Let us go {hobby}," {P} said to {Q}.

## mid.they |
They {moved} {manner} together.
They looked at the {sight}.
They shared some {taste} {food}.
They played {game} for a {length}.
They heard a {noise} from the {spot}.
They sat down by the {spot}.
They talked about {hobby}.
They made a {puzzle} together.
They waited under the {tree} tree.

## have.new | have P O
{P} made a {color} {O}.
{P} bought a {O} for {number} coins.
{P} made a {O} of {stuff}.
A {job} gave {P*} a {look} {O}.
{P} got a {O} as a gift.
{P} won a {O} in a game of {game}.
{P} brought a {O} from home.
{P} built a {O} with {his} {relative}.
{P} borrowed a {look} {O} from the {job}.
{P} packed a {O} and some {food}.
"I have a {O}," {P} {said}.

## find.new | find P O
{P} found a {look} {O}.
{P} found a {O} under the {spot}.
{P} picked up a {color} {O}.
Behind the {spot}, {P} found a {O}.
{P} found a {O} in the {sight}.
{P} pulled a {look} {O} from the mud.
"I found a {O}!" {P} {said}.
{P} caught a {O} that fell down.
{P} dug up a {color} {O}.

## find.place | find P O, at L
{P} found a {O} near the {L}.
{P} found a {look} {O} at the {L}.
{P} picked up a {O} by the {L}.
At the {L}, {P} found a {O}.

## see.new | see O
{P} saw a {O} on the {spot}.
There was a {O} under the {tree} tree.
A {color} {O} lay on the ground.
{P} noticed a {look} {O} by the {spot}.
"Look, a {O}!" {P} {said}.
A {O} hung from the {tree} tree.

## pick | pick P O
{P} picked up the {O}.
{P} took the {O} home.
{P} put the {O} in {his} pocket.
{P} grabbed the {O} with one {body}.
{P} took {it} {manner}.
{P} picked {it} up and {moved} home.

## want.new | want P O
{P} wanted a {look} {O}.
{P} looked for a {color} {O}.
{P} asked for a {O}.
{P} needed a {O} right away.
"I wish I had a {O}," {P} {said}.
{P} had no money for a {O}.

## use | use P O
{P} showed the {O} to {his} {relative}.
{P} held the {O} {manner}.
{P} cleaned the {O} with {drink}.
{P} played with the {O} all {daytime}.
{P} painted the {O} {color}.
{P} carried the {O} in a {look} bag.
{P} kept the {O} near {his} {spot}.
{P} put {his} {O} on the {spot}.
{P} loved {his} {look} {O}.
{P} took {his} {O} on the {ride}.
{P} held {his} {O} over {his} {body}.
{P} used the {O} to fix the {spot}.
{P} tied the {O} to the {ride}.
{P} liked {it} very much.
{P} held {it} with both hands.
{P} looked at {it} {manner}.
"This is my {O}," {P} {said}.
"Look at my {O}," {P} {said}.
"My {O} is {look}," {P} said.
{P} dropped the {O} but caught it.

## use.two | use P O
{P} showed the {O} to {Q}.
{P} and {Q!} played with the {O}.
{P} let {Q} hold the {O}.
"Do you like my {O}?" {P} asked {Q}.
"You can play with my {O}," {P} told {Q}.
"Your {O} is {look}," {Q!} told {P*}.
{P} hid the {O} from {Q}.

## give | give P O Q
{P} gave the {O} to {Q}.
{P} gave {Q} the {O}.
{P} gave {it} to {Q}.
{P} handed {his} {O} to {Q}.
{P} sold the {O} to {Q}.
{P} lent {Q} the {look} {O}.
"Take my {O}," {P} said to {Q}.
"Here is the {O}," {P} told {Q}.
{P} traded the {O} to {Q} for {food}.

## take | take P O Q
{P} took the {O} from {Q}.
{P} borrowed the {O} from {Q}.
{P} got the {O} back from {Q}.
{P} bought the {O} from {Q}.
"Give me the {O}," {P} said, and {Q!} did.

## have.friend | have Q O
{P} saw that {Q!} had a {O}.
"I brought a {O}," {Q!} told {P*}.
{Q!} showed {P} a {color} {O}.
{P} liked that {Q!} had a {look} {O}.

## want.other | want P O, know O
{P} wanted the {O} too.
"May I see the {O}?" {P} asked.
{P} dreamed about the {O}.

## lose | lose P O
{P} lost the {O} in the {sight}.
{P} lost {his} {O} on the way.
The wind blew the {O} away from {P!}.
{P} lost {it} near the {spot}.
The {O} fell from the hands of {P!}.
"Oh no, I lost my {O}!" {P} {said}.
{P} left the {O} on the {ride}.

## seek | seek P O
{P} looked everywhere for the {O}.
{P} searched the {spot} for the {O}.
{P} could not find the {O}.
"Where is my {O}?" {P} asked.
{P} missed the {look} {O}.
"Have you seen the {O}?" {P} asked the {job}.

## found | refind P O
{P} found the {O} under the {spot}.
At last, {P} found the {O} again.
A {kind} {job} brought the {O} back to {P!}.
{P} found {his} lost {O} behind the {spot}.
"I found my {O}!" {P} {said}.

## drop | drop P O
{P} put the {O} down {manner}.
{P} left the {O} by the {spot}.
{P} hung the {O} on the {tree} tree.
{P} set {it} down on the {spot}.

## break | destroy P O
{P} broke the {O} by mistake.
The {O} fell down and {P} broke it.
{P} sat on the {O} and it broke.
{P} threw {his} {O} into the fire.

## animal.new |
{P} saw a {trait} {A}.
{P} met a {A} near the {spot}.
A {trait} {A} came out of the {sight}.
A {color} {A} {moved} by.
{P} heard a {A} behind the {spot}.
There was a {A} in the {ride}.
A {trait} {A} {rested} under the {tree} tree.
"Look, a {A}!" {P} {said}.
A {A} wanted some {food}.
{P} helped a {trait} {A}.
{P} drew a {A} on the {spot}.
Suddenly, a {A} jumped over the {spot}.

## animal.place | at L
{P} saw a {A} at the {L}.
A {trait} {A} lived near the {L}.
{P} met a {A} by the {L}.
At the {L}, a {A} {rested}.

## animal.use |
The {A} {rested} {manner}.
The {A} ate the {taste} {food}.
The {A} {moved} after {P*}.
The {A} looked at {P*} and {rested}.
{P} fed the {A} some {food}.
{P} petted the {trait} {A}.
{P} talked to the {A}.
{P} chased the {A} round the {spot}.
{P} gave the {A} a bowl of {drink}.
{P} rode on the {A}.
{P} was not {mood} of the {A}.
The {A} licked {P*} on the {body}.
The {A} wagged its tail at {P*}.
The {A} sat on the {spot}.
"Hello, little {A}," {P} {said}.
"Are you lost?" {P} asked the {A}.
The {A} followed {P*} home.
The {A} wanted to play {game}.
The {A} made a funny {noise}.
{P} washed the {A} with {drink}.

## animal.thing | use P O
{P} showed the {O} to the {A}.
The {A} liked the {O} that {P} had.
{P} put the {O} on the {A}.
The {A} played with {P*} and the {O}.

## animal.bring | have P O
The {A} brought {P*} a {O}.
{P} got a {look} {O} for the {A}.

## animal.steal | steal A O
The {A} took the {O} and {moved} off.
The {A} stole the {O} from {P*}.
Then the {A} grabbed the {O}.

## animal.return | give A O P
The {A} gave the {O} back to {P*}.
The {A} dropped the {O} in front of {P*}.

## animal.away | away A
The {A} {moved} away.
The {A} went back to the {sight}.
{P} set the {A} free.
The {A} was gone by {daytime}.

## go | go P L
{P} went to the {L}.
{P} {moved} to the {L}.
{P} took the {ride} to the {L}.
After that, {P} went to the {L}.
{P} rode a {ride} to the {L}.
{P} {moved} {manner} to the {L}.
"I will go to the {L}," {P} {said}, and off {he} went.
{P} found the way to the {L}.

## go.two | go P L
{P} and {Q!} went to the {L}.
{P} took {Q} to the {L}.
{P} followed {Q} to the {L}.
"Let us go to the {L}," {P} told {Q}, and they went.

## at | at L
The {L} was very {weather}.
The {L} was full of {flower}.
{P} {rested} near the {L}.
It was {weather} at the {L}.
{P} played {game} at the {L}.
{P} ate {food} at the {L}.
{P} liked it at the {L}.
"I like the {L}," {P} {said}.
A {job} worked at the {L}.

## leave | leave Q
Then {Q!} went home.
{Q!} had to leave on the {ride}.
{Q!} said goodbye to {P*} and left.
"""
