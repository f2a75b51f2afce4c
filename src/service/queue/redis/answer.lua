-- A manager answers, to who waits for it by the name of the question.
local key = answer_key(ARGV[3])
redis.call('RPUSH', key, ARGV[4])
redis.call('PEXPIRE', key, 60000)
return 1
