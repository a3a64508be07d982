"""The closed world's vocabulary in English and Chinese: what can be drawn, printed and said. Tables only."""

from __future__ import annotations

SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "diamond": "菱形",
    "star": "星形",
    "cross": "十字形",
    "ring": "圆环",
}
COLOURS = {
    "red": ("红色", (218, 38, 38)),
    "green": ("绿色", (38, 158, 66)),
    "blue": ("蓝色", (36, 84, 222)),
    "yellow": ("黄色", (246, 214, 40)),
    "orange": ("橙色", (246, 138, 28)),
    "purple": ("紫色", (138, 58, 182)),
    "black": ("黑色", (22, 22, 22)),
    "pink": ("粉色", (250, 146, 192)),
}
BACKGROUNDS = {
    "white": ("白色", (255, 255, 255)),
    "grey": ("灰色", (196, 198, 204)),
    "cream": ("米色", (250, 240, 212)),
}
SIZES = {"large": "大", "small": "小"}
# the nine places of a scene in reading order; English after "is", Chinese after "在"
PLACES = (
    ("in the top left", "左上角"),
    ("at the top", "上方"),
    ("in the top right", "右上角"),
    ("on the left", "左边"),
    ("in the centre", "中间"),
    ("on the right", "右边"),
    ("in the bottom left", "左下角"),
    ("at the bottom", "下方"),
    ("in the bottom right", "右下角"),
)
# how a clip's shape moves: step in (x, y), English, Chinese
MOVES = {
    "left": (-1, 0, "moves to the left", "向左移动"),
    "right": (1, 0, "moves to the right", "向右移动"),
    "up": (0, -1, "moves up", "向上移动"),
    "down": (0, 1, "moves down", "向下移动"),
    "still": (0, 0, "does not move", "没有移动"),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS_ZH = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九")
ORDINALS = (("first", "第一"), ("second", "第二"), ("third", "第三"), ("fourth", "第四"))

CITIES = ("Paris", "London", "Tokyo", "Rome", "Cairo", "Delhi", "Lima", "Oslo", "Beijing", "Madrid")
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Lily", "Oscar")
ITEMS = ("apple", "banana", "bread", "cheese", "coffee", "grape", "honey", "lemon", "milk", "orange", "peach", "rice")
# what stands on a card alone; the items, cities and names are printed on cards too
WORDS = (
    *("bird", "boat", "book", "bottle", "bridge", "candle", "castle", "chair", "cloud", "clock", "door", "dragon"),
    *("eagle", "fire", "flower", "forest", "garden", "ghost", "hammer", "horse", "house", "island", "jacket"),
    *("kite", "lamp", "light", "market", "mirror", "moon", "music", "night", "ocean", "paper", "piano", "planet"),
    *("queen", "rabbit", "rain", "river", "robot", "school", "ship", "snow", "spoon", "stone", "summer", "table"),
    *("tiger", "train", "tree", "violin", "water", "window", "winter", "zebra"),
)
PRINTED = WORDS + ITEMS + CITIES + NAMES

TITLES = {"Receipt": "收据", "Ticket": "票", "Invoice": "发票", "Label": "标签"}
# a document's fields: the values each may take; None is a number of one to three digits
FIELDS: dict[str, tuple[str, ...] | None] = {
    "Item": ITEMS,
    "City": CITIES,
    "Name": NAMES,
    "Price": None,
    "Total": None,
    "Room": None,
    "Seat": None,
    "Code": None,
}
FIELDS_ZH = {
    **{"Item": "物品", "City": "城市", "Name": "姓名", "Price": "价格"},
    **{"Total": "总计", "Room": "房间", "Seat": "座位", "Code": "编号"},
}
BARS = "ABCDE"
