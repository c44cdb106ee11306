"""The words of the demo tasks: everyday English, first names, cities and other record values."""

COMMON = """
able about above actor after again agent air all allow alone along always among anchor angle animal
answer apple april apron arena arm army around arrow art ask atlas autumn away baby back bacon badge
bag baker ball banana band bank barn basket bath beach bean bear beauty bed bee begin bell below
bench berry big bike bird blanket blue board boat body bone book boot bottle box boy branch brave
bread break brick bridge bright bring broom brother brown brush bucket build bus bush butter button
cabin cake call camel camera camp candle candy canoe captain car card care carpet carrot castle cat
chain chair chalk change cheese cherry chest chicken child circle city class clean clear climb clock
cloud clown coat coffee coin cold color come computer cook copper corn corner cotton cousin cow
crane cream crow crown cup curtain dance dark daughter dawn day deep deer desert desk dinner dish
doctor dog doll dolphin door dragon draw dream dress drink drive drum duck dust eagle ear early
earth east easy eat edge egg eight elbow elephant empty engine evening every eye face fair fall
family far farm fast father feather fence field finger fire fish five flag flame floor flower fly
fog follow food foot forest fork found four fox fresh friend frog fruit game garden gate ghost giant
gift girl give glass glove goat gold good goose grape grass great green ground group guest guitar
hair half hammer hand happy harbor hat have hawk head heart heavy hello help hen here hero high hill
hold holiday home honest honey hood hook hope horse hotel hour house human hundred hungry ice idea
inch ink insect iron island ivory jacket jam jar jelly jewel join joke juice jump jungle keep kettle
key kind king kitchen kite kitten knee knife knight know ladder lady lake lamb lamp land language
large last laugh lawn leaf learn leather left lemon lesson letter library light lion list listen
little lizard long look loud love lucky lunch machine magic make mango many map maple marble market
mask match meadow meal meat medal melon metal middle milk mill minute mirror money monkey month moon
morning mother mountain mouse mouth music nail name napkin narrow nature near neck needle nest never
new night nine noise north nose note nurse oak ocean office old olive one onion open orange orchard
order other oven owl page paint palace pan paper parent park parrot party past peach pear pencil
people pepper piano picnic picture pie pillow pilot pirate planet plant plate play please pocket
poem point pond pony potato pretty prince puppy purple purse queen question quick quiet rabbit radio
rain read red rice rich ride right ring river road robin robot rock roof room root rope rose round
sail salad salt same sand saw say school sea seat second seed seven shadow shark sheep shell ship
shirt shoe shop short silver simple sing sister six sky sleep slow small smile snake snow soap sock
soft song soup south space spider spoon spring square stable star station stone storm story street
strong student sugar summer sun sunny swan sweet table tail take tall tea teacher ten tent thank
that the there thing think three throat thunder ticket tiger time tiny toast today together tomato
tooth tower town toy train travel tree truck true trumpet tulip turtle twelve two uncle under
valley van velvet village violin visit voice wagon walk wall warm wash watch water wave weather week
west whale wheat wheel white wild wind window winter wish wolf woman wonder wood word work world
yard year yellow yes young zebra zero
""".split()

NAMES = """
Ada Alan Alice Amy Ana Anna Ann Ben Bob Carl Carlos Chen Clara Dan David Diana Elena Ella Emma Eric
Eva Fatima Finn Frank Grace Hana Henry Ida Ines Ivan Jack Jane Jin John Jonas Julia Karl Kate Kim
Lara Laura Leo Lena Li Lily Linda Lucas Maria Mark Mary Max Mei Mia Mike Nina Noah Nora Olga Oscar
Otto Paul Peter Petra Rosa Ruth Sam Sara Sofia Tom Uma Vera Victor Wei Yuki Zoe
""".split()

CITIES = """
Athens Berlin Bern Bogota Boston Cairo Chicago Dakar Delhi Denver Dublin Geneva Hanoi Helsinki Kyoto
Lagos Lima Lisbon London Lyon Madrid Manila Miami Milan Moscow Mumbai Munich Nairobi Oslo Paris
Prague Quito Riga Rome Seattle Seoul Shanghai Sofia Sydney Tokyo Toronto Turin Vienna Warsaw Zurich
""".split()

COLORS = "black blue brown gold green orange pink purple red silver white yellow".split()
ANIMALS = "bear cat cow dog duck fox goat horse lion mouse owl rabbit sheep tiger wolf".split()
FOODS = "apple bread cake cheese corn fish mango pasta pizza rice salad soup".split()
JOBS = "actor artist baker cook doctor driver farmer nurse painter pilot teacher writer".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

SYLLABLES = """
an ar at ba be bo ca ce ch co da de di ed en er es et fi fo ga ge gr ha he ho ic in ing ion is it ka
ki la le li lo ma me mi mo na ne ni no on or ou pa pe pi po ra re ri ro sa se sh si so st ta te th
ti to tr un ur va ve vi wa we wi ya yo za
""".split()
