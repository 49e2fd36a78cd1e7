// The official client for node: a chat, a stream, structured output, a function, errors.

import OpenAI from "openai";

const model = process.env.SERVER_MODEL;
const client = new OpenAI({ maxRetries: 0 });
const request = {
  model,
  messages: [{ role: "user", content: "What is the capital of France?" }],
  temperature: 0,
  max_tokens: 24,
};

const models = [];
for await (const card of await client.models.list()) models.push(card.id);

const asked = await client.chat.completions.create(request);

let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  ...request,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}

const gathered = await client.chat.completions.stream(request).finalContent();
const completed = await client.completions.create({ model, prompt: "1, 2, 3, 4, 5,", temperature: 0, max_tokens: 8 });

const schema = {
  type: "object",
  properties: {
    name: { type: "string", maxLength: 40 },
    inhabitants: { type: "integer", minimum: 0, maximum: 100000000 },
  },
  required: ["name", "inhabitants"],
  additionalProperties: false,
};
const parsed = await client.chat.completions.parse({
  ...request,
  max_tokens: 200,
  response_format: { type: "json_schema", json_schema: { name: "city", strict: true, schema } },
});

const called = [];
const runner = client.chat.completions.runTools({
  ...request,
  max_tokens: 200,
  tool_choice: { type: "function", function: { name: "find_city" } },
  tools: [
    {
      type: "function",
      function: {
        name: "find_city",
        parameters: schema,
        parse: JSON.parse,
        function: (found) => {
          called.push(found);
          return "found";
        },
      },
    },
  ],
});
await runner.done();

const responded = await client.responses.create({
  model,
  input: "What is the capital of France?",
  temperature: 0,
  max_output_tokens: 24,
  store: false,
});

const errors = [];
for (const wrong of [{ model: "nobody-has-this" }, { temperature: 9 }]) {
  try {
    await client.chat.completions.create({ ...request, ...wrong });
  } catch (error) {
    errors.push([error.constructor.name, error.status, error.param]);
  }
}

console.log(
  JSON.stringify({
    models,
    asked: asked.choices[0].message.content,
    streamed,
    usage: usage.total_tokens,
    gathered,
    completed: completed.choices[0].text,
    parsed: parsed.choices[0].message.parsed,
    called,
    responded: responded.output_text,
    errors,
  }),
);
