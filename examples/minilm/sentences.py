"""Two small tasks, written for this example: (sentence, the one it should be near, the one it should not).

The base model is weak at both, because it relies on shared words. The last ``HELD_OUT`` triples of each task are
never used for training.
"""

HELD_OUT = 16

Triple = tuple[str, str, str]

# What was felt matters, not what it was about.
FEELING: list[Triple] = [
    ("The film was wonderful.", "What a lovely meal.", "The film was dreadful."),
    ("The hotel was filthy.", "A horrible, boring book.", "The hotel was spotless."),
    ("I adore my new job.", "This song makes me so happy.", "I loathe my new job."),
    ("The journey was a nightmare.", "That soup was disgusting.", "The journey was a dream."),
    ("Our teacher is so kind.", "A splendid little garden.", "Our teacher is so cruel."),
    ("The concert bored me to death.", "What an ugly colour.", "The concert thrilled me."),
    ("The bread tastes heavenly.", "We had a marvellous holiday.", "The bread tastes awful."),
    ("The waiter was rude.", "The worst match of the year.", "The waiter was charming."),
    ("Such a cosy flat.", "The singer was brilliant.", "Such a gloomy flat."),
    ("The phone is a piece of rubbish.", "I regret that trip.", "The phone is a gem."),
    ("The play moved me deeply.", "The best coffee in town.", "The play annoyed me deeply."),
    ("The bed was painfully hard.", "The staff ignored us, shameful.", "The bed was perfectly soft."),
    ("This bike is a joy.", "Great service and friendly people.", "This bike is a pain."),
    ("The beach was full of rubbish.", "A dull and lifeless speech.", "The beach was full of sunshine."),
    ("I love how this coat fits.", "The children had great fun.", "I hate how this coat fits."),
    ("The lecture was a waste of time.", "The cake was stale and dry.", "The lecture was a pleasure."),
    ("The view is breathtaking.", "A clever and witty comedy.", "The view is depressing."),
    ("The repair was a disaster.", "His voice gets on my nerves.", "The repair was a success."),
    ("The neighbours are delightful.", "The stew turned out superbly.", "The neighbours are unbearable."),
    ("The update ruined everything.", "A miserable, cold little room.", "The update improved everything."),
    ("The party was fantastic.", "I am proud of this painting.", "The party was terrible."),
    ("The seats are awful.", "The novel disappointed me.", "The seats are excellent."),
    ("The doctor was gentle.", "A superb evening at the theatre.", "The doctor was rough."),
    ("The market smells foul.", "The game is full of annoying faults.", "The market smells delicious."),
    # held out
    ("The museum was fascinating.", "Her cooking is excellent.", "The museum was tedious."),
    ("The train was overcrowded and slow.", "What a nasty perfume.", "The train was airy and fast."),
    ("I enjoyed the walk.", "A beautifully made table.", "I hated the walk."),
    ("The wine is sour.", "The plot makes no sense, a mess.", "The wine is exquisite."),
    ("The guide was brilliant.", "Fresh, crisp and full of flavour.", "The guide was hopeless."),
    ("The camp was a misery.", "Cheap, ugly furniture.", "The camp was a delight."),
    ("The opera was magnificent.", "The sofa is wonderfully soft.", "The opera was ghastly."),
    ("The app keeps failing.", "The fish was rotten.", "The app keeps amazing me."),
    ("My boss is a treasure.", "The sunset was glorious.", "My boss is a tyrant."),
    ("The shoes hurt terribly.", "An unfriendly, noisy bar.", "The shoes fit marvellously."),
    ("The lesson was inspiring.", "These plums are so sweet and good.", "The lesson was dreary."),
    ("The street looks shabby.", "The actors were embarrassing.", "The street looks splendid."),
    ("The gift delighted her.", "The pool is clean and inviting.", "The gift upset her."),
    (
        "The call was a frustrating ordeal.",
        "The pasta was cold and tasteless.",
        "The call was a happy surprise.",
    ),
    ("The camera is superb.", "A warm and heartfelt letter.", "The camera is lousy."),
    ("The winter was grim.", "The clerk was arrogant.", "The winter was glorious."),
]

# A statement belongs to what says the same, not to what denies it in nearly the same words.
NEGATION: list[Triple] = [
    ("The door is open.", "One can walk right in.", "The door is not open."),
    ("She likes music.", "Songs give her joy.", "She does not like music."),
    ("The soup is hot.", "Careful, it burns the tongue.", "The soup is not hot."),
    ("He can swim.", "He moves well in water.", "He cannot swim."),
    ("They have arrived.", "The guests are here.", "They have not arrived."),
    ("The exam was easy.", "Everyone solved it quickly.", "The exam was not easy."),
    ("I trust my doctor.", "I believe what the physician tells me.", "I do not trust my doctor."),
    ("The road is safe.", "Nothing bad happens on this way.", "The road is not safe."),
    ("We won the game.", "Victory was ours.", "We did not win the game."),
    ("The phone works.", "You can make calls with it.", "The phone does not work."),
    ("He told the truth.", "What he said was honest.", "He never told the truth."),
    ("The room is clean.", "There is no dirt anywhere.", "The room is not clean."),
    ("You may leave.", "Feel free to go.", "You may not leave."),
    ("The plan succeeded.", "It all turned out well.", "The plan did not succeed."),
    ("It rains here.", "Drops fall from the clouds.", "It never rains here."),
    ("Birds can fly.", "They rise into the air on wings.", "Birds cannot fly."),
    ("The baby is asleep.", "The little one slumbers.", "The baby is not asleep."),
    ("He paid the bill.", "The money has been handed over.", "He has not paid the bill."),
    ("The museum is free.", "No ticket is needed to visit.", "The museum is not free."),
    ("She remembers me.", "My face is still known to her.", "She does not remember me."),
    ("The bread is fresh.", "It came out of the oven just now.", "The bread is not fresh."),
    ("We agree.", "All of us think alike.", "We do not agree."),
    ("There is time.", "No need to hurry.", "There is no time."),
    ("He is guilty.", "He did commit the crime.", "He is not guilty."),
    # held out
    ("The lake is deep.", "Its bottom is far down.", "The lake is not deep."),
    ("She speaks French.", "She can talk with people in Paris.", "She does not speak French."),
    ("The shop is closed.", "Nobody can buy anything now.", "The shop is not closed."),
    ("I am tired.", "I need some sleep.", "I am not tired."),
    ("The medicine helps.", "Patients feel better after it.", "The medicine does not help."),
    ("He kept his promise.", "He did as he had said.", "He did not keep his promise."),
    ("The snow has melted.", "The ground is bare again.", "The snow has not melted."),
    ("They know the answer.", "The solution is familiar to them.", "They do not know the answer."),
    ("The chair is comfortable.", "One sits well on it.", "The chair is not comfortable."),
    ("Children are allowed.", "Kids may come in.", "Children are not allowed."),
    ("The engine is running.", "The motor turns.", "The engine is not running."),
    ("She forgave him.", "She holds nothing against him any more.", "She never forgave him."),
    ("The story is true.", "It really happened.", "The story is not true."),
    ("We need help.", "Somebody should assist us.", "We do not need help."),
    ("The coat is warm.", "It protects well from cold.", "The coat is not warm."),
    ("He eats meat.", "Beef and pork are on his plate.", "He does not eat meat."),
]
