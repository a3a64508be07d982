"""A little plain text in both languages: it gives the tokenizer common words beyond the closed world. Text only."""

ENGLISH = """
People look at pictures every day and tell each other what they have seen. Some pictures are photographs, others are
drawn by hand or printed on paper. When you read a book, a letter or a newspaper, you also look at small pictures: every
word is a shape, and every number is one too. A good answer is short, clear and true. If something is not known, it is
better to say so than to guess. Please write down the name, the address, the date and the time before you leave. The
weather will be cold in the morning and warm in the afternoon, with some rain in the evening. She bought two tickets for
the train and waited at the station with her brother. We could not find the key, because it was under the chair next to
the window. This model was trained to answer questions about its own small world, and it does not know much about yours.
Which of these would you like to have first? There should be enough room for all of us. He works in a small shop and
sells fruit, bread, milk and cheese. My children go to school by bus; their teacher is very friendly. Can you explain
how this works? I would like to understand it better. Yesterday we walked along the river until we came to an old
bridge. From here you can see the mountains, the lake and the forest. It takes about twenty minutes to get there.
What happened after that? Nobody knows, but many people have told stories about it. Give me a short summary, then
translate it into Chinese. The following table shows
the results of each year. Memory, speed and quality are measured on the same machine.
Open the file, read the text, change one line and save it again. Thank you for your message; we will reply soon.
"""

CHINESE = """
人们每天都看图片，并且把看到的东西告诉别人。有的图片是照片，有的是手画的，还有的印在纸上。读书、看信、看报纸的时候，
你看到的每一个字也是一个小小的图形，数字也一样。好的回答应该简短、清楚、真实。如果不知道，就应该说不知道，不要乱猜。
请在离开之前写下你的姓名、地址、日期和时间。今天早上很冷，下午会暖和一些，晚上可能有小雨。她买了两张火车票，和弟弟
一起在车站等车。我们找不到钥匙，因为它在窗户旁边的椅子下面。这个模型只学过自己的小世界，对外面的世界了解得不多。
你想先要哪一个？这里的地方够我们大家用。他在一家小商店工作，卖水果、面包、牛奶和奶酪。我的孩子坐公共汽车上学，他们的
老师非常好。你能解释一下这是怎么工作的吗？我想更好地理解它。昨天我们沿着河走，一直走到一座老桥。从这里可以看到山、湖和
森林。
到那里大约需要二十分钟。后来发生了什么事？没有人知道，但是很多人都讲过这个故事。请用中文写一个简短的总结，然后
翻译成英文。下面的表格显示了每一年的结果。内存、速度和质量都是在同一台机器上测量的。打开文件，读出文字，改一行，再保存。
谢谢你的来信，我们会很快回复。
"""
